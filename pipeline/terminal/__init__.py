"""Output on a terminal: lines, tables, progress, exit status."""
