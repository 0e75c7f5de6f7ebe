"""Feature maps of 8 bits: near their values, at every shape, and only where they are smaller."""

import numpy as np
import pytest
import torch

from kdpipe.stages.targets.outputs import decode_features as decode_on_device
from kdpipe.store import ArraySpec, StoreError
from kdpipe.store.format.encodings.quantized_maps import (
    decode_features,
    dequantize,
    quantize,
    quantized_specs,
    unpaired,
)

RNG = np.random.default_rng(3)


def made(shape, scale=5.0, offset=2.0):
    spread = np.exp(RNG.standard_normal((1, shape[1], *[1] * (len(shape) - 2)))) if len(shape) == 4 else 1.0
    return (scale * spread * RNG.standard_normal(shape) + offset).astype(np.float32)


@pytest.mark.parametrize("shape", [(7, 3, 4, 5), (7, 3, 1, 5), (7, 9, 6), (1, 300, 40, 40)])
def test_values_are_within_a_step(shape):
    maps = made(shape)
    codes, ranges = quantize(maps)
    assert (codes.dtype, codes.shape, ranges.dtype) == (np.uint8, shape, np.float16)
    decoded = dequantize(codes, ranges)
    axes = (2, 3) if len(shape) == 4 else (1,)
    span = np.ptp(maps, axis=axes, keepdims=True)
    rounding = np.abs(maps).max(axis=axes, keepdims=True) * 2.0**-10
    assert (np.abs(decoded - maps) <= span / 255 * 0.65 + rounding).all()
    assert len(np.unique(codes)) > 15


def test_zeros_after_a_relu_and_constant_channels_are_exact():
    maps = np.maximum(made((5, 4, 6, 6), offset=0.0), 0)
    maps[:, 1], maps[:, 2] = 0.0, 1.5
    decoded = dequantize(*quantize(maps))
    assert (decoded[maps == 0] == 0).all()
    assert (decoded[:, 2] == 1.5).all()


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 9, 6)])
def test_training_decodes_as_numpy_does(shape):
    codes, ranges = quantize(made(shape))
    arrays = {"features/a": codes, "range/a": ranges, "pooled/a": ranges}
    tensors = {name: torch.from_numpy(rows) for name, rows in arrays.items()}
    for name in ("features/a", "pooled/a"):
        assert np.allclose(decode_on_device(tensors, name).numpy(), decode_features(arrays, name), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e8])
def test_values_that_are_not_finite_or_too_large_are_refused(value):
    maps = made((9, 3, 4, 4))
    maps[4, 1, 2, 3] = value
    with pytest.raises(StoreError, match=r"not finite, or too large for 8 bits.* rows \[4\]"):
        quantize(maps)


def test_only_maps_that_shrink_have_eight_bits():
    map_spec = ArraySpec("features-8x8/layer3", (6, 8, 8), "float16")
    codes, ranges = quantized_specs(map_spec)
    assert (codes.name, codes.row_shape, codes.dtype) == ("features-8x8/layer3", (6, 8, 8), "uint8")
    assert (ranges.name, ranges.row_shape, ranges.dtype) == ("range-8x8/layer3", (2, 6), "float16")
    kept = [("features/a", (6, 2, 2)), ("features/pre_logits", (512,)), ("gram/a", (6, 6)), ("attention/a", (8, 8))]
    for spec in (ArraySpec(name, shape, "float16") for name, shape in kept):
        assert quantized_specs(spec) == (spec,)
    assert unpaired([codes, ranges]) is None
    assert (unpaired([codes]), unpaired([ranges])) == (ranges.name, ranges.name)
