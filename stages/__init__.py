"""What each stage does. Empty on purpose: a command imports what it needs, and only training needs torch at once."""
