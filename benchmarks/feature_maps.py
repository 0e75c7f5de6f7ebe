"""Compare encodings of feature maps: bytes a row, relative error, and that of the attention maps made of them.

    uv run python benchmarks/feature_maps.py MAPS.npy ...

Each file has a layer's maps, float32 [N, C, H, W]. Errors are root mean squares over those of the exact maps. Beside
kdpipe's, a range for each row and channel, there are ranges of other groups of numbers, in float32 and not counted, and
float8 (e4m3) scaled by the largest of each channel over all rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.stages.targets.statistics import attention
from kdpipe.store.format.encodings.quantized_maps import dequantize, quantize

Maps = NDArray[np.float32]
E4M3_LARGEST = 448


def encodings(exact: Maps) -> Iterator[tuple[str, float, Maps]]:
    """Yield name, bytes a row and decoded maps [N, C, H, W] of each encoding."""
    numbers, channels = exact[0].size, exact.shape[1]
    yield "float16", 2 * numbers, exact.astype(np.float16).astype(np.float32)
    yield "int8, range of a row and channel (kdpipe)", numbers + 4 * channels, dequantize(*quantize(exact))
    for name, axes in {"a row": (1, 2, 3), "a channel": (0, 2, 3), "all": (0, 1, 2, 3)}.items():
        low, high = exact.min(axis=axes, keepdims=True), exact.max(axis=axes, keepdims=True)
        step = np.maximum((high - low) / 255, 1e-30)
        yield f"int8, range of {name}", numbers, np.rint((exact - low) / step) * step + low
    scale = np.abs(exact).max(axis=(0, 2, 3), keepdims=True) / E4M3_LARGEST + 1e-30
    eight = torch.from_numpy(exact / scale).to(torch.float8_e4m3fn).float().numpy()
    yield "float8, scale of a channel", numbers, eight * scale


def relative(found: NDArray[Any], exact: NDArray[Any]) -> float:
    """Return the root mean square of the errors over that of the exact numbers."""
    return float(np.sqrt(np.square(found.astype(np.float64) - exact).sum() / np.square(exact.astype(np.float64)).sum()))


def main() -> None:
    for path in sys.argv[1:]:
        exact = np.load(path, allow_pickle=False).astype(np.float32)
        print(f"\n{path}: {list(exact.shape)}\n\n| encoding | bytes a row | error | of attention maps |")
        print("|---|---:|---:|---:|")
        wanted = attention(torch.from_numpy(exact)).numpy()
        for name, num_bytes, decoded in encodings(exact):
            mapped = attention(torch.from_numpy(np.asarray(decoded, np.float32))).numpy()
            errors = relative(decoded, exact), relative(mapped, wanted)
            print(f"| {name} | {num_bytes:,.0f} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
