"""`kdpipe plan`: what a run costs, and what of it exists already."""
