"""One paper a file, and `terms`, which makes modules of the recipe's entries."""
