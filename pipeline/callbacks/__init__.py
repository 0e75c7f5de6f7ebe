"""Callbacks by name, and the built-in ones, which write metrics to files and experiment trackers."""
