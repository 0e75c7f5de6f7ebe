"""Tests of keeping the labels of some samples."""

import pytest
import torch
from support.tiny_run import squares

from kdpipe.stages.data.image_set import digest, kept_labels
from kdpipe.stages.data.labeling import hide_labels, keep_labels
from kdpipe.stages.errors import RecipeError


def test_few_labels_are_among_many_with_all_classes():
    whole = squares(300, 0)
    few, many = keep_labels(whole, 40), keep_labels(whole, 100)
    counts, all_counts = (torch.bincount(one.labels[one.labeled]) for one in (few, whole))
    assert len(few.labeled) == 40 and (counts - 40 * all_counts / 300).abs().max() <= 1
    assert set(few.labeled.tolist()) < set(many.labeled.tolist())
    assert torch.equal(few.labels[few.labeled], whole.labels[few.labeled])
    assert few.label_name(int(few.labeled[0])) in "abcd"
    assert not keep_labels(whole, "none").has_labels
    assert keep_labels(whole, "all") is whole


def test_stores_know_the_samples_whatever_labels_are_kept():
    whole = squares(300, 0)
    kept = [keep_labels(whole, what) for what in ("none", 40, 300)]
    assert [digest(one) for one in kept] == [digest(whole)] * 3
    assert len({str(kept_labels(one)) for one in (whole, *kept)}) == 4  # their trainings differ
    assert torch.equal(kept[0].take(torch.tensor([3, 1])).listed_labels, whole.labels[[3, 1]])


def test_more_labels_than_there_are_is_an_error():
    few = keep_labels(squares(300, 0), 40)
    with pytest.raises(RecipeError, match="data.labels = 41: the train split of squares has 40 labeled samples"):
        keep_labels(few, 41)


def test_partners_keep_no_other_labels():
    whole = squares(300, 0)
    few = keep_labels(whole, 40).take(torch.arange(200))
    hidden = hide_labels(whole, few)
    assert hidden.labeled.tolist() == few.labeled.tolist()
    assert hide_labels(whole, whole) is whole
