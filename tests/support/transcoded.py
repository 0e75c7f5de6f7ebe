"""Helpers for tests of `transcode`."""

import numpy as np

from kdpipe.store import ArraySpec, Codec, open_store
from kdpipe.store.write.transcode import transcode

ZSTD, BLOSC = Codec("zstd", 3), Codec("blosc", 3)
FLOAT32 = (ArraySpec("logits", (10,), "float32"), ArraySpec("features/layer2.0", (3, 5), "float32"))
FEATURES = "features/layer2.0"


def read_arrays(path):
    """Read every array of a store, all views: [V, N, ...], each shard checked."""
    store = open_store(path)
    return {
        spec.name: np.stack([store.read_view(spec.name, view) for view in range(store.num_views)])
        for spec in store.arrays
    }


def changed(source, change, name="target.zarr"):
    target = source.parent / name
    transcode(source, target, change)
    return target
