"""Encoding errors are measured correctly, add up over units, and are short and deterministic."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kdpipe.store.format.encodings.encoding_error import (
    KL_ROWS,
    TEMPERATURES,
    all_finite,
    kl_rows,
    measure_dense,
    measure_features,
    measure_topk,
    merge,
    row_kl,
    summarize_features,
    summarize_logits,
)
from kdpipe.store.format.encodings.topk import INDICES, VALUES, TopK, default_temperatures, encode_topk


def made_logits(num_rows=300, num_classes=20, seed=0):
    return (np.random.default_rng(seed).normal(size=(num_rows, num_classes)) * 3).astype(np.float32)


def plain_kl(exact, decoded, temperature):
    p, q = (np.exp(z.astype(np.float64) / temperature) for z in (exact, decoded))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    return (p * np.log(p / q)).sum(axis=1)


def test_exact_logits_lose_nothing():
    logits = made_logits()
    assert summarize_logits(measure_dense(logits, logits)) == {
        "num_rows": 300,
        "top1_flips": 0,
        "largest_error": 0.0,
        "kl": dict.fromkeys(["1", "2", "4", "8", "20"], 0.0),
    }


def test_dense_losses_are_those_of_the_formulas():
    exact = made_logits()
    stored = exact + np.float32(0.3) * made_logits(seed=1)
    found = summarize_logits(measure_dense(exact, stored))
    for temperature in TEMPERATURES:
        assert found["kl"][f"{temperature:g}"] == pytest.approx(plain_kl(exact, stored, temperature).mean(), rel=1e-5)
    assert found["top1_flips"] == sum(exact.argmax(axis=1) != stored.argmax(axis=1)) > 0
    assert found["largest_error"] == pytest.approx(np.abs(exact - stored).max(), rel=1e-5)


def test_half_precision_loses_little_but_something():
    exact = made_logits()
    found = summarize_logits(measure_dense(exact, exact.astype(np.float16)))
    assert 0 < found["kl"]["1"] < 1e-6
    assert 0 < found["largest_error"] <= 2**-8


def test_flips_are_counted_in_every_row():
    exact = np.zeros((2000, 3), np.float32)
    exact[:, 1] = 1.0
    stored = exact.copy()
    stored[5::2, 2] = 2.0
    measured = measure_dense(exact, stored)
    assert measured["top1_flips"] == 998
    assert measured["kl_rows"] == KL_ROWS


def test_topk_losses_shrink_with_k_and_count_kept_errors_only():
    exact, form = made_logits(), {k: TopK(20, k, default_temperatures(), "float32") for k in (2, 10, 19)}
    found = {
        k: summarize_logits(measure_topk(exact, form[k].pack(encode_topk(exact, form[k], "float32")), form[k]))
        for k in form
    }
    assert found[2]["kl"]["1"] > found[10]["kl"]["1"] > found[19]["kl"]["1"]
    assert found[19]["kl"]["1"] < 1e-6
    assert found[2]["largest_error"] == 0.0
    assert found[2]["top1_flips"] == 0
    half = encode_topk(exact, form[2], "float16")
    error = np.abs(half[VALUES].astype(np.float32) - np.take_along_axis(exact, half[INDICES].astype(int), 1)).max()
    older = replace(form[2], dtype=None)  # in three arrays
    assert measure_topk(exact, half, older)["largest_error"] == pytest.approx(error, rel=1e-5)


def test_tie_after_rounding_counts_as_flip_in_both_encodings():
    exact = np.array([[8.0001, 8.0002, 0.0], [1.0, 5.0, 0.0]], np.float32)
    form = TopK(3, 2, default_temperatures())
    assert measure_dense(exact, exact.astype(np.float16))["top1_flips"] == 1
    assert measure_topk(exact, form.pack(encode_topk(exact, form, "float16")), form)["top1_flips"] == 1


def test_topk_is_measured_at_the_temperatures_that_it_covers():
    exact, form = made_logits(), TopK(20, 5, default_temperatures(2.0, 8.0))
    assert list(measure_topk(exact, form.pack(encode_topk(exact, form, "float16")), form)["kl"]) == ["2", "4", "8"]


@pytest.mark.parametrize("num_rows", [0, 1, 511, 512, 513, 100_000])
def test_divergence_rows_are_few_and_evenly_spaced(num_rows):
    rows = kl_rows(num_rows)
    assert len(rows) == min(num_rows, KL_ROWS)
    if num_rows:
        assert rows[0] == 0
        assert rows[-1] < num_rows
        steps = np.diff(rows)
        assert steps.size == 0 or steps.max() - steps.min() <= 1
        assert steps.size == 0 or steps.min() >= 1


def test_divergence_is_finite_for_saturated_logits():
    exact, decoded = np.array([[120.0, -120.0]]), np.array([[-120.0, 120.0]])
    assert row_kl(exact, decoded, 1.0) == pytest.approx([240.0])


def test_units_add_up_to_the_whole():
    exact = made_logits(num_rows=400)
    stored = exact.astype(np.float16)
    whole = measure_dense(exact, stored)
    parts = [measure_dense(exact[start : start + 100], stored[start : start + 100]) for start in range(0, 400, 100)]
    merged = merge(parts)
    assert (merged["num_rows"], merged["kl_rows"]) == (400, 400)
    assert merged["top1_flips"] == whole["top1_flips"]
    assert merged["largest_error"] == whole["largest_error"]
    for name, total in whole["kl"].items():
        assert merged["kl"][name] == pytest.approx(total, rel=1e-4)
    assert merge([]) == {}
    assert merge([merged]) == merged


def test_measurements_are_short_json():
    exact = made_logits()
    for measured in (measure_dense(exact, exact.astype(np.float16)), measure_features(exact, exact.astype(np.float16))):
        text = json.dumps(measured)
        assert json.loads(text) == measured
        assert len(text) < 250


def test_features_have_their_largest_and_relative_error():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(60, 4, 3, 3)).astype(np.float32)
    stored = (exact * 1.01).astype(np.float32)
    parts = [measure_features(exact[:20], stored[:20]), measure_features(exact[20:], stored[20:])]
    found = summarize_features(merge(parts))
    assert found["num_rows"] == 60
    assert found["relative_rms"] == pytest.approx(0.01, rel=1e-3)
    assert found["largest_error"] == pytest.approx(0.01 * np.abs(exact).max(), rel=1e-3)


def test_features_that_are_all_zero_have_no_error():
    zero = np.zeros((4, 2), np.float32)
    assert summarize_features(measure_features(zero, zero)) == {
        "num_rows": 4,
        "largest_error": 0.0,
        "relative_rms": 0.0,
    }


def test_finite_numbers_are_told_by_their_bits():
    patterns = np.arange(2**16, dtype=np.uint16)
    specials = np.array([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    for numbers in (patterns.view(np.float16), specials, specials.astype(np.float64)):
        assert [all_finite(numbers[i : i + 1]) for i in range(len(numbers))] == np.isfinite(numbers).tolist()
    finite = patterns.view(np.float16)[np.isfinite(patterns.view(np.float16))]
    assert all_finite(finite)
    assert all_finite(finite[::2])
    assert not all_finite(np.append(finite, np.float16("nan")))
    assert all_finite(patterns)
    assert all_finite(finite[:0])
