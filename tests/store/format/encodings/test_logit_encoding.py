"""Encodings of logits in fewer bytes: their errors, the means of what is sampled, and their edges."""

import numpy as np
import pytest
import torch

from kdpipe.stages.targets.outputs import dequantize, teacher_targets
from kdpipe.store import StoreError, TopK
from kdpipe.store.format.encodings.encoding_error import row_kl
from kdpipe.store.format.encodings.logit_encoding import encoding_json, measure_encoded, parse_encoding
from kdpipe.store.format.encodings.quantized import PACKED, Quantized
from kdpipe.store.format.encodings.sampled import Sampled, probabilities, threshold

RNG = np.random.default_rng(5)
LOGITS = (RNG.standard_normal((40, 21)) * 3).astype(np.float32)
LOGITS[0], LOGITS[1, 3], LOGITS[2] = 1.5, 300.0, RNG.permutation(21)  # flat, peaked, even steps
IDS = np.arange(40, dtype=np.int64) * 7


def encoded(encoding, logits=LOGITS, ids=IDS, view=0):
    return encoding.encode(logits, "float16", ids, view)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("num_classes", [1, 2, 20, 21])
def test_quantized_rows_are_near_at_every_size(name, bits, num_classes):
    encoding, exact = Quantized(name, num_classes), LOGITS[:, :num_classes]
    rows = encoded(encoding, exact)
    assert rows[PACKED].shape == (40, *encoding.arrays("float16")[0].row_shape)
    assert rows[PACKED].shape[1] == 4 + -(-num_classes * bits // 8)
    decoded = encoding.decode(rows)
    spread = np.ptp(exact, axis=1, keepdims=True)
    half = 2e-3 * np.abs(exact).max(axis=1, keepdims=True)  # float16
    assert (np.abs(decoded - exact) <= spread * np.diff(encoding.places).max() * 0.51 + half).all()
    assert np.allclose(decoded.max(axis=1), exact.max(axis=1), rtol=1e-3)


def test_quantized_logits_keep_the_softmax():
    exact = (RNG.standard_normal((2000, 100)) * 3).astype(np.float32)
    ids = np.arange(2000)
    for name, limit in {"int8": 1e-4, "int4": 3e-2}.items():
        encoding = Quantized(name, 100)
        rows = encoded(encoding, exact, ids)
        for temperature in (1.0, 4.0, 20.0):
            assert row_kl(exact, encoding.decode(rows), temperature).mean() < limit
        assert measure_encoded(exact, rows, encoding)["num_rows"] == 2000


@pytest.mark.parametrize("encoding", [Quantized("int8", 21), Quantized("int4", 21), Sampled(21, 5, 3)])
def test_training_decodes_as_numpy_does(encoding):
    rows = encoded(encoding)
    arrays = {name: torch.from_numpy(values) for name, values in rows.items()}
    targets = teacher_targets(encoding, arrays, {})
    assert np.array_equal(targets.logits_at(1.0).numpy(), encoding.decode(rows))
    index = torch.tensor([3, 0, 3])
    assert np.array_equal(targets.rows(index).logits_at(1.0).numpy(), encoding.decode(rows)[[3, 0, 3]])


def test_a_range_beyond_float16_is_cut():
    logits = np.array([[6e4, 0.0, -6e4, -1e30]], np.float32)
    decoded = Quantized("int8", 4).decode(encoded(Quantized("int8", 4), logits, IDS[:1]))
    assert np.isfinite(decoded).all()
    assert np.allclose(decoded[0, :2], [6e4, 0.0], atol=200)
    assert (decoded[0, 2:] <= 0).all()


@pytest.mark.parametrize("encoding", [Quantized("int8", 21), Quantized("int4", 21), Sampled(21, 5, 3)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(encoding, value):
    logits = LOGITS.copy()
    logits[7, 3] = value
    with pytest.raises(StoreError, match=r"not finite.* rows \[7\]"):
        encoded(encoding, logits)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_mean_of_sampled_labels_is_the_softmax(k):
    encoding, num_views = Sampled(21, k, seed=3), 4000
    exact = probabilities(LOGITS)
    mean = np.zeros_like(exact)
    for view in range(num_views):
        mean += probabilities(encoding.decode(encoded(encoding, view=view))) / num_views
    limit = threshold(exact, k)  # a class is drawn with probability p / limit, and has the weight limit
    deviation = np.sqrt(exact * limit / num_views)
    rounding = 2.0**-11 * np.abs(np.log(limit)) * exact  # of logarithms in half precision
    assert (np.abs(mean - exact) < 5 * deviation + 4 * limit / num_views + rounding).all()


def test_sampled_classes_depend_on_sample_and_view_alone():
    encoding = Sampled(21, 5, seed=3)
    whole = encoded(encoding, view=2)
    assert np.array_equal(encoded(encoding, LOGITS[9:12], IDS[9:12], 2)[PACKED], whole[PACKED][9:12])
    for other in (encoded(encoding, view=1), encoded(Sampled(21, 5, seed=4), view=2)):
        assert not np.array_equal(encoding.unpack(other[PACKED])[1], encoding.unpack(whole[PACKED])[1])
    same = np.repeat(LOGITS[:1], 40, axis=0)
    assert len(np.unique(encoded(encoding, same)[PACKED], axis=0)) > 10


def test_sampled_rows_have_different_classes_and_mass_one():
    encoding = Sampled(21, 5, seed=3)
    logits = np.concatenate([LOGITS, 1000 * LOGITS])
    values, classes = encoding.unpack(encoded(encoding, logits, np.arange(80))[PACKED])
    assert (np.diff(classes, axis=1) > 0).all()
    assert np.allclose(np.exp(values.astype(np.float64)).sum(axis=1), 1, atol=2e-3)
    top = np.take_along_axis(classes, values.argmax(axis=1)[:, None], axis=1)[40:, 0]
    assert np.array_equal(top[1:], logits[41:].argmax(axis=1))  # saturated: one class has all of the mass


def test_sampled_labels_are_for_temperature_one():
    encoding = Sampled(21, 5, seed=3)
    with pytest.raises(StoreError, match="at T = 1, not at 4"):
        encoding.decode(encoded(encoding), 4.0)
    arrays = {name: torch.from_numpy(values) for name, values in encoded(encoding).items()}
    with pytest.raises(StoreError, match="at T = 1, not at 2"):
        teacher_targets(encoding, arrays, {}).logits_at(2.0)


def test_quantized_bytes_are_those_of_the_format_page():
    logits = np.array([[1.0, -2.0, 0.25]], np.float32)
    row = encoded(Quantized("int4", 3), logits, IDS[:1])[PACKED][0]
    assert row[:4].view("<f2").tolist() == [1.0, 3.0]
    assert row[4:].tolist() == [0 | 15 << 4, round(15 * (0.75 / 3) ** 0.75)]
    decoded = dequantize(Quantized("int4", 3), torch.from_numpy(row[None]))[0].tolist()
    assert decoded == pytest.approx([1.0, -2.0, 1 - 3 * (5 / 15) ** (4 / 3)], rel=1e-6)


@pytest.mark.parametrize(("num_classes", "bits"), [(2, 1), (3, 2), (4, 2), (257, 9), (70_000, 17)])
def test_sampled_classes_have_as_many_bits_as_they_need(num_classes, bits):
    encoding = Sampled(num_classes, 1 if num_classes == 2 else 2, seed=3)
    logits = np.zeros((8, num_classes), np.float32)
    logits[:, [0, -1]] = 50.0  # the first and the last class have all of the mass
    rows = encoded(encoding, logits, IDS[:8])
    assert rows[PACKED].shape == (8, 2 * encoding.k + -(-encoding.k * bits // 8))
    assert set(encoding.unpack(rows[PACKED])[1].flatten().tolist()) == {0, num_classes - 1}
    arrays = {PACKED: torch.from_numpy(rows[PACKED])}
    assert np.array_equal(teacher_targets(encoding, arrays, {}).logits_at(1.0).numpy(), encoding.decode(rows))


@pytest.mark.parametrize("encoding", [None, TopK(9, 2, (1.0, 4.0)), Quantized("int4", 9), Sampled(9, 2, 7)])
def test_the_record_of_an_encoding_is_read_back(encoding):
    assert parse_encoding(encoding_json(encoding)) == encoding


@pytest.mark.parametrize(
    "record",
    [
        "int8",
        {"name": "int2", "num_classes": 9},
        {"name": ["int8"], "num_classes": 9},
        {"name": "int8", "num_classes": 0},
        {"name": "int8", "num_classes": 2.5},
        {"name": "sampled", "num_classes": 9, "k": 9, "seed": 0},
        {"name": "sampled", "num_classes": 9, "k": 2},
    ],
)
def test_invalid_records_are_refused(record):
    with pytest.raises((TypeError, ValueError, KeyError)):
        parse_encoding({"top_k": None, "encoding": record})
