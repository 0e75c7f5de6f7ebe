"""Classes that the teacher finds similar: means over labels, pairs and neighbors."""

import math

import numpy as np
import pytest
from support.made_store import make_store

from kdpipe.pipeline.report.html.heat import NUM_LEVELS, level_of
from kdpipe.pipeline.report.html.sections.similarity import (
    TEMPERATURE,
    Similarity,
    _neighbors,
    closest_pairs,
    similarity_of,
)
from kdpipe.store import StoreError, open_store


def test_similarity_is_mean_softened_output_by_label(tmp_path, monkeypatch):
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.BATCH_ROWS", 100)
    made = make_store(tmp_path / "made.zarr", num_samples=250)
    found = similarity_of(open_store(made.path), "made")
    logits = made.contents["logits"][0].astype(float)
    for label in range(10):
        rows = logits[made.samples.labels == label]
        each = [[math.exp(one / TEMPERATURE) for one in row] for row in rows]
        expected = np.mean([np.array(row) / sum(row) for row in each], axis=0)
        assert found.shares[label] == pytest.approx(expected)
    assert found.num_samples == 250
    assert np.isnan(np.diagonal(found.others)).all()


def test_similarity_of_many_classes_is_that_of_the_most_frequent(tmp_path, monkeypatch):
    """Memory and time are bounded: 21,841 classes would be 4 GB a matrix."""
    store = open_store(make_store(tmp_path / "made.zarr", num_samples=250).path)
    whole = similarity_of(store, "made")
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.MAX_SHARES", 40)
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.BATCH_OUTPUTS", 30)
    found = similarity_of(store, "made")
    counts = np.bincount(store.samples.labels, minlength=10)
    assert found.classes.tolist() == sorted(sorted(range(10), key=lambda label: (-counts[label], label))[:4])
    assert np.array_equal(found.shares, whole.shares[found.classes])
    assert found.num_samples == counts[found.classes].sum()
    assert {label for pair in closest_pairs(found, 20) for label in pair} == set(found.classes.tolist())
    neighbors = _neighbors(found).rows
    assert neighbors == [row for row in _neighbors(whole).rows if row[0] in [found.names[i] for i in found.classes]]
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.MAX_NEIGHBORS", 2)
    own = found.shares[np.arange(4), found.classes]
    assert [row[0] for row in _neighbors(found).rows] == [
        found.names[found.classes[i]] for i in sorted(own.argsort()[:2])
    ]
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.MAX_OUTPUTS", 100)
    assert similarity_of(store, "made").num_samples == 10


def test_similarity_refuses_labels_outside_of_classes(tmp_path, monkeypatch):
    made = make_store(tmp_path / "made.zarr", num_samples=50)
    store = open_store(made.path)
    store.samples.labels[3] = 10
    with pytest.raises(StoreError, match="not among the teacher's classes"):
        similarity_of(store, "made")


def test_closest_pairs_skip_classes_without_images():
    shares = np.full((5, 5), 0.001)
    shares[0, 2] = shares[3, 1] = 0.2
    shares[4] = np.nan
    found = Similarity(tuple("abcde"), np.arange(5), shares, 1, "made")
    assert list(closest_pairs(found, 2)) == [(0, 2), (1, 3)]
    assert len(list(closest_pairs(found, 20))) == 6


def test_heat_map_levels():
    levels = level_of(np.array([[0.0, 1.0], [0.25, np.nan]]), (0.0, 1.0))
    assert levels.tolist() == [[0, NUM_LEVELS - 1], [NUM_LEVELS // 2, -1]]
    assert level_of(np.zeros((1, 1)), (0.0, 0.0)).tolist() == [[0]]
