"""Many students of one recipe: `kdpipe compare` and `kdpipe sweep`."""
