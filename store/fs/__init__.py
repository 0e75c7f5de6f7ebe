"""File system primitives: atomic writes, locks and bounded reads of untrusted files."""
