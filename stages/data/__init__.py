"""Data sets by name: images, labels and stable sample ids."""
