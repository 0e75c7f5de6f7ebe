"""The runtimes that compressed students are made for, and the grid of INT8 activations that each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Target = Literal["onnxruntime", "openvino", "executorch", "tensorrt"]
Grid = Literal["affine", "symmetric"]
SCHEMES = ("int8", "w4a8", "int4")
"""The kinds of quantized networks: what `compress.quantize.scheme` can be."""

GRIDS: dict[Target, Grid] = {
    "onnxruntime": "affine",
    "openvino": "affine",
    "executorch": "affine",
    "tensorrt": "symmetric",
}
TARGETS = f"{', '.join(map(repr, GRIDS))}, or a list of several"
FLOAT16 = "float16"
"""The name of a network's FP16 file among those of the targets."""

TITLES = {
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
    FLOAT16: "FP16",
}


def quantized_grids(scheme: str, targets: Sequence[Target]) -> dict[str, Grid]:
    """Return the kinds of quantized networks at the end of the chain, each with its grid.

    The first is that of the first target, and of all targets with its grid; a target with another grid adds one that is
    named after it.
    """
    kinds: dict[str, Grid] = {}
    for target in targets:
        if GRIDS[target] not in kinds.values():
            kinds[f"{scheme}-{target}" if kinds else scheme] = GRIDS[target]
    return kinds


def targets_of(target: Target | Sequence[Target]) -> tuple[Target, ...]:
    """Return the targets that a recipe's `compress.target` names."""
    return (target,) if isinstance(target, str) else tuple(target)
