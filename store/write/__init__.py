"""Write stores: fill, extend, shrink and transcode them, with claims between processes."""
