"""Top-k logits: kept logits are exact, and the rest has its mass at every temperature, for any rows."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.topk import (
    INDICES,
    TAIL,
    VALUES,
    TopK,
    default_temperatures,
    dense_logits,
    encode_topk,
    index_dtype,
    interpolation,
    tail_log_odds,
    tail_log_sum_exp,
)

GRID = default_temperatures()
KINDS = {
    "gauss": lambda rng, shape: rng.normal(size=shape) * rng.uniform(1, 8, size=(shape[0], 1)),
    "peaked": lambda rng, shape: rng.normal(size=shape) * 1.5 + 30 * rng.random(shape) ** (2 * shape[1]),
    "flat": lambda rng, shape: rng.normal(size=shape) * 0.01,
    "equal": lambda rng, shape: np.full(shape, rng.normal()),
    "ties": lambda rng, shape: rng.integers(-3, 4, size=shape),
    "extreme": lambda rng, shape: np.where(rng.random(shape) < 1 / shape[1], 120.0, rng.normal(size=shape)),
    "saturated": lambda rng, shape: np.where(rng.random(shape) < 0.5, 120.0, -120.0),
}


def made_logits(kind, num_classes, offset=0.0, seed=0, num_rows=40):
    rng = np.random.default_rng(seed)
    return (KINDS[kind](rng, (num_rows, num_classes)) + offset).astype(np.float32)


def log_sum_exp(logits):
    largest = logits.max(axis=1, keepdims=True)
    return largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))


def softmax(logits, temperature):
    scaled = logits.astype(np.float64) / temperature
    return np.exp(scaled - log_sum_exp(scaled)[:, None])


rows = st.builds(
    made_logits,
    kind=st.sampled_from(sorted(KINDS)),
    num_classes=st.sampled_from([2, 3, 10, 100, 255, 256, 1000]),
    offset=st.sampled_from([0.0, 50.0, -50.0]),
    seed=st.integers(0, 1000),
)
temperatures = st.floats(GRID[0], GRID[-1])


@settings(deadline=None, max_examples=80)
@given(data=st.data(), logits=rows, temperature=temperatures, dtype=st.sampled_from(["float16", "float32"]))
def test_kept_logits_are_exact_and_the_rest_has_its_mass(data, logits, temperature, dtype):
    num_classes = logits.shape[1]
    k = data.draw(
        st.sampled_from(sorted({1, 2, 5, 20, num_classes // 2, num_classes - 1} & set(range(1, num_classes))))
    )
    form = TopK(num_classes, k, GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = encode_topk(logits, form, dtype)
        dense = dense_logits(made[VALUES], made[INDICES], made[TAIL], form, temperature)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert np.array_equal(made[INDICES], expected)
    assert np.array_equal(made[VALUES], np.take_along_axis(logits, expected, axis=1).astype(dtype))
    for layout in (None, dtype):
        form = TopK(num_classes, k, GRID, layout)
        packed = form.pack(made)
        assert [(spec.name, spec.row_shape, np.dtype(spec.dtype)) for spec in form.arrays(dtype)] == [
            (name, array.shape[1:], array.dtype) for name, array in packed.items()
        ]
        assert all(np.array_equal(part, made[name]) for name, part in form.unpack(packed).items())
    mass, found = (softmax(table, temperature) for table in (logits, dense))
    for table in (mass, found):
        np.put_along_axis(table, expected, 0.0, axis=1)
    assert np.abs(mass.sum(axis=1) - found.sum(axis=1)).max() < 1e-3


@settings(deadline=None, max_examples=30)
@given(logits=rows, temperature=temperatures)
def test_probabilities_of_kept_classes_come_back(logits, temperature):
    form = TopK(logits.shape[1], max(1, logits.shape[1] // 3), GRID)
    made = encode_topk(logits, form, "float32")
    dense = dense_logits(made[VALUES], made[INDICES], made[TAIL], form, temperature)
    found, wanted = (np.take_along_axis(softmax(z, temperature), made[INDICES].astype(int), 1) for z in (dense, logits))
    assert np.abs(found - wanted).max() < 1e-3
    top = np.take_along_axis(dense, made[INDICES].astype(int)[:, :1], axis=1)
    assert (dense - top).max() / temperature < 1e-3  # no other class rises above the teacher's choice


@pytest.mark.parametrize("temperature", [GRID[0], GRID[7], 3.7, GRID[-1]])
def test_the_log_sum_exp_of_the_rest_is_the_plain_one(temperature):
    logits = made_logits("gauss", 100, offset=50.0)
    form = TopK(100, 10, GRID)
    made = encode_topk(logits, form, "float32")
    rest = -np.sort(-logits.astype(np.float64), axis=1)[:, 10:]
    odds = tail_log_odds(made[TAIL], form, temperature)
    wanted = log_sum_exp(rest / temperature)
    seen = odds > -8  # a mass below 3e-4 need not be known to so many digits
    assert seen.sum() >= 10
    found = tail_log_sum_exp(made[VALUES], made[TAIL], form, temperature)
    assert np.abs(found - wanted)[seen].max() < 0.02


def test_a_row_shifted_has_the_same_tail():
    logits = np.round(made_logits("gauss", 100) * 64) / 64
    form = TopK(100, 5, GRID)
    tails = [encode_topk((logits + shift).astype(np.float32), form, "float16")[TAIL] for shift in (0, 64, -64)]
    assert np.array_equal(tails[0], tails[1])
    assert np.array_equal(tails[0], tails[2])


def test_equal_logits_keep_the_lower_classes_in_order():
    logits = np.array([[1, 2, 2, 0, 2, 2], [0, 0, 0, 0, 0, 0], [-0.0, 0.0, -1, 0.0, 5, -0.0]], np.float32)
    made = encode_topk(logits, TopK(6, 3, GRID), "float16")
    assert made[INDICES].tolist() == [[1, 2, 4], [0, 1, 2], [4, 0, 1]]


def test_rows_do_not_depend_on_their_neighbors():
    logits = made_logits("ties", 1000, num_rows=700)  # more than a block
    form = TopK(1000, 20, GRID)
    whole = encode_topk(logits, form, "float16")
    for row in (0, 261, 262, 263, 699):
        single = encode_topk(logits[row : row + 1], form, "float16")
        assert all(np.array_equal(single[name][0], whole[name][row]) for name in whole)


def test_no_rows_are_encoded_to_no_rows():
    made = encode_topk(np.empty((0, 10), np.float32), TopK(10, 3, GRID), "float16")
    assert [array.shape for array in made.values()] == [(0, 3), (0, 3), (0, len(GRID))]


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(2, "uint8"), (255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32")]
)
def test_indices_are_narrow_and_leave_a_fill_value(num_classes, dtype):
    assert index_dtype(num_classes) == dtype
    assert np.iinfo(dtype).max > num_classes - 1


@settings(deadline=None)
@given(temperature=temperatures, coefficients=st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_the_spline_is_exact_for_cubics_in_log_temperature(temperature, coefficients):
    form = TopK(10, 3, GRID)
    columns = np.polyval(coefficients, np.log(GRID))
    assert abs(columns @ interpolation(form, temperature) - np.polyval(coefficients, np.log(temperature))) < 1e-9


@pytest.mark.parametrize("grid", [(2.0,), (1.0, 20.0), (1.0, 4.0, 20.0), (1, 2, 4, 8), default_temperatures(0.1, 1000)])
def test_any_grid_is_met_at_its_own_temperatures(grid):
    form = TopK(10, 3, grid)
    for place, temperature in enumerate(grid):
        assert np.array_equal(interpolation(form, temperature), np.arange(len(grid)) == place)
    between = (grid[0] * grid[-1]) ** 0.5
    assert interpolation(form, between).sum() == pytest.approx(1.0, abs=1e-9)


def test_temperature_outside_grid_is_refused_with_range():
    form = TopK(10, 3, GRID)
    for temperature in (0.99, 20.01, float("nan")):
        with pytest.raises(StoreError, match=r"from 1 to 20, not"):
            interpolation(form, temperature)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e5])
def test_logits_that_do_not_fit_are_named_by_row(bad):
    logits = made_logits("gauss", 10)
    logits[[3, 7], 4] = bad
    with pytest.raises(StoreError, match=r"2 of 40 rows .*float16, for example rows \[3, 7\]"):
        encode_topk(logits, TopK(10, 3, GRID), "float16")


def test_classes_without_mass_are_allowed_in_the_rest():
    logits = np.array([[1.0, 2.0, -np.inf, -np.inf], [3.0, 1.0, 0.0, -np.inf]], np.float32)
    form = TopK(4, 2, GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = encode_topk(logits, form, "float16")
    assert np.all(made[TAIL][0] == -32)
    dense = dense_logits(made[VALUES], made[INDICES], made[TAIL], form, 1.0)
    assert softmax(dense, 1.0)[:, 2:].sum(axis=1) == pytest.approx(softmax(logits, 1.0)[:, 2:].sum(axis=1), abs=1e-4)


def test_logits_of_another_width_are_refused():
    with pytest.raises(StoreError, match=r"shape \[2, 9\], wanted \[rows, 10\]"):
        encode_topk(np.zeros((2, 9), np.float32), TopK(10, 3, GRID), "float16")


def test_index_out_of_classes_is_damage():
    form = TopK(10, 3, GRID)
    made = encode_topk(made_logits("gauss", 10), form, "float16")
    made[INDICES][2, 1] = 255
    with pytest.raises(StoreError, match="hold class 255, the store has 10"):
        dense_logits(made[VALUES], made[INDICES], made[TAIL], form, 2.0)


@pytest.mark.parametrize(("num_classes", "row_bytes"), [(100, 94), (1000, 101), (129, 96), (128, 94)])
def test_classes_have_as_many_bits_as_the_last_one(num_classes, row_bytes):
    (spec,) = TopK(num_classes, 20, GRID).arrays("float16")
    assert (spec.name, spec.row_shape, spec.dtype) == ("logits/packed", (row_bytes,), "uint8")
    assert row_bytes == 2 * 20 + 2 * 18 + -(-20 * (num_classes - 1).bit_length() // 8)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_top_k_survives_json(dtype):
    form = TopK(1000, 20, GRID, dtype)
    assert ("dtype" in form.to_json()) == bool(dtype)
    assert TopK.from_json(json.loads(json.dumps(form.to_json()))) == form


GOOD = {"num_classes": 10, "k": 3, "temperatures": [1.0, 2.0]}


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {**GOOD, "dtype": "float8"},
        {**GOOD, "k": 0},
        {**GOOD, "k": 10},
        {**GOOD, "k": -1},
        {**GOOD, "k": 3.0},
        {**GOOD, "k": True},
        {**GOOD, "k": "3"},
        {**GOOD, "num_classes": 2**40},
        {**GOOD, "num_classes": None},
        {**GOOD, "temperatures": []},
        {**GOOD, "temperatures": 4},
        {**GOOD, "temperatures": "12"},
        {**GOOD, "temperatures": [1.0, None]},
        {**GOOD, "temperatures": [True, 2.0]},
        {**GOOD, "temperatures": [2.0, 1.0]},
        {**GOOD, "temperatures": [1.0, 1.0]},
        {**GOOD, "temperatures": [1.0, 1.0 + 1e-12]},
        {**GOOD, "temperatures": [0.0, 1.0]},
        {**GOOD, "temperatures": [-1.0, 1.0]},
        {**GOOD, "temperatures": [float("nan")]},
        {**GOOD, "temperatures": [1.0, float("inf")]},
        {**GOOD, "temperatures": [1.0, 10**400]},
        {**GOOD, "temperatures": [1.0 + step for step in range(65)]},
    ],
)
def test_malformed_values_are_refused(record):
    with pytest.raises((TypeError, ValueError, KeyError)):
        TopK.from_json(record)


def test_default_grids_have_given_ends_and_max_ratio():
    for lowest, highest in ((1.0, 20.0), (1.0, 4.0), (0.5, 8.0), (2.0, 2.2), (0.01, 1000.0), (4.0, 4.0)):
        grid = default_temperatures(lowest, highest)
        assert (grid[0], grid[-1]) == (lowest, highest)
        assert all(high / low < 1.2065 for low, high in pairwise(grid))
    assert len(default_temperatures()) == 18
    TopK(10, 3, default_temperatures(0.5, 8.0))
