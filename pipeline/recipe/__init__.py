"""Load, check, describe and write recipes."""
