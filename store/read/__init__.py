"""Read stores: open, map and gather rows by sample id."""
