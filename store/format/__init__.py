"""The store's format: layout, manifest, shards, markers and encodings. Docs: docs/store-format.md."""
