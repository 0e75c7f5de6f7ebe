"""Read remote and packed stores, and stage them into a local cache."""
