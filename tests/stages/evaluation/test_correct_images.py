"""Which images are correct, as kept with results."""

from dataclasses import asdict

import pytest
import torch

from kdpipe.stages.evaluation.correct_images import outcome_of, pack

IDS = torch.tensor([7, 3, 9, 1, 4, 2, 8, 6, 5])
CORRECT = torch.tensor([True, False, True, True, False, False, True, True, True])


def result_of(correct=CORRECT, ids=IDS, **changes):
    kept = asdict(pack(correct, ids, torch.zeros_like(ids))) | changes
    return {"accuracy": correct.double().mean().item(), "examined": {"correct": kept}}


def test_bits_survive_and_do_not_depend_on_the_order():
    found = outcome_of(result_of())
    by_id = dict(zip(IDS.tolist(), CORRECT.tolist(), strict=True))
    assert found.correct.tolist() == [by_id[number] for number in sorted(by_id)]
    order = torch.randperm(len(IDS))
    other = outcome_of(result_of(CORRECT[order], IDS[order]))
    assert other.images == found.images and other.correct.tolist() == found.correct.tolist()
    assert outcome_of(result_of(ids=IDS + 1)).images != found.images


def test_older_results_have_the_number_of_images_or_less():
    assert outcome_of({"accuracy": 0.5}).num_images is None
    found = outcome_of({"accuracy": 0.5, "examined": {"per_class": [{"num_samples": 3}, {"num_samples": 4}]}})
    assert (found.num_images, found.correct) == (7, None)


@pytest.mark.parametrize(
    "damage", [{"num_images": 99}, {"num_images": 0}, {"bits": "AA"}, {"bits": "AAA="}, {"bits": "?"}]
)
def test_damaged_bits_are_refused(damage):
    with pytest.raises(ValueError):
        outcome_of(result_of(**damage))
