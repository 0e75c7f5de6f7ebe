"""Constants of the store schema; importable without numpy."""

from __future__ import annotations

SCHEMA_VERSION = 3

ATTRIBUTE = "kdpipe"
"""The key of the manifest in the Zarr group's attributes."""

MARKERS = "markers"
"""The array of commit markers."""

MARKER_BYTES = 16 * 1024
"""Size of a marker: room for the files of about a hundred arrays, so that layers can be added to a store later."""

SAMPLES = "samples"
"""The Zarr group of sample ids, labels and pixel checksums."""

METADATA_BYTES = 16 * 2**20
"""Maximum size of a metadata file."""

MAX_COUNT = 2**40
"""Maximum number of samples or rows: a larger count is damage, or an attack."""

MAX_UNITS = 2**20

MAX_SHARD_BYTES = 2**35
"""With MAX_UNITS units of kdpipe's default 64 MiB, an array may have 64 TiB."""
