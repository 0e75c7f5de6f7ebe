"""The verdict on distillation, and the differences that it is made from."""

import re
from dataclasses import replace

import numpy as np
import pytest

from kdpipe.pipeline.report.differences import between, differences_of
from kdpipe.pipeline.report.verdict import Accuracy, Setting, setting_of, verdict
from kdpipe.stages.evaluation.intervals import Outcome

PLAIN = Setting(num_views=8)


def seeds(*right, num_images=1000, shift=0):
    """Return outcomes of networks with so many images right, the first ones after `shift`."""
    made = [np.roll(np.arange(num_images) < number, shift) for number in right]
    return [Outcome(float(one.mean()), num_images, one, "images") for one in made]


def verdict_of(teacher=None, alone=None, student=None, setting=PLAIN):
    given = {"teacher": teacher, "alone": alone, "student": student}
    outcomes = {kind: own for kind, own in given.items() if own}
    accuracies = {
        kind: Accuracy(f"the {kind}", 100 * float(np.mean([one.accuracy for one in own])))
        for kind, own in outcomes.items()
    }
    gain, gap = (between(outcomes, kind, "alone") for kind in ("student", "teacher"))
    return verdict(accuracies, gain, gap, setting)


GOOD = {"teacher": seeds(950), "alone": seeds(800), "student": seeds(860)}
FEW = {"teacher": seeds(53, num_images=60), "alone": seeds(51, num_images=60), "student": seeds(42, num_images=60)}


@pytest.mark.parametrize(
    ("case", "result", "wanted"),
    [
        (
            GOOD,
            "helped",
            r"^Distillation helped: .*\+6\.00 points \(95 % interval .* over images, p < 0\.001; 1,000 test",
        ),
        (GOOD, "helped", r"closes 40 % of the gap to the teacher's 95\.00 %"),
        (GOOD | {"teacher": seeds(840)}, "helped", r"The teacher reaches 84\.00 %\.$"),
        (GOOD | {"teacher": seeds(801)}, "helped", r"The gap between the student alone and the teacher.* is not clear"),
        (GOOD | {"student": seeds(700)}, "harmed", r"^Distillation did harm: .*-10\.00 points"),
        (GOOD | {"student": seeds(803)}, "unclear", r"^Whether distillation helped is not clear: .*p = 0\.250"),
        (GOOD | {"student": seeds(860, 865), "alone": seeds(800, 805)}, "helped", r"1,000 test images, 2 seeds"),
        ({"alone": seeds(800), "student": seeds(860)}, "helped", r"1 seed\)\.$"),
        ({"teacher": seeds(950)}, "unknown", r"^Best network finished so far: the teacher, 95\.00 % test accuracy"),
        ({}, "unknown", "^No network of this run is finished yet"),
    ],
)
def test_verdict_says_what_is_clear(case, result, wanted):
    found = verdict_of(**case)
    assert found.result == result
    assert re.search(wanted, found.sentence), found.sentence


@pytest.mark.parametrize(("labels", "number"), [("none", "0 of 5,000"), (1200, "1,200 of 5,000"), ("all", None)])
def test_few_labels_are_told(labels, number):
    setting = replace(setting_of({"student": {}, "data": {"labels": labels}}, []), num_images=5000)
    told = verdict_of(**GOOD, setting=setting).sentence.endswith(f" Labeled training images: {number}.")
    assert told == (number is not None)


def test_no_share_of_a_gap_that_is_not_clear():
    """60 test images, a teacher 3 points better, a student 15 points worse: no "-450 % of the gap"."""
    found = verdict_of(**FEW)
    assert found.share_closed is None
    assert not re.search(r"\d %.* of the gap", found.text)
    assert any("stronger teacher" in one for one in found.advice)


@pytest.mark.parametrize(
    ("case", "setting", "wanted"),
    [
        (GOOD, PLAIN, []),
        (GOOD | {"student": seeds(803)}, PLAIN, ["more seeds"]),
        (GOOD | {"student": seeds(700)}, PLAIN, []),
        (GOOD | {"student": seeds(700), "teacher": seeds(790)}, PLAIN, ["a stronger teacher"]),
        (GOOD | {"student": seeds(700)}, replace(PLAIN, last_is_best=True), ["more epochs"]),
        (GOOD | {"student": seeds(700)}, replace(PLAIN, num_views=1), ["more views than 1"]),
        (
            GOOD | {"student": seeds(700)},
            replace(PLAIN, temperatures=[4.0]),
            ["another temperature than 4, such as 2 or 8"],
        ),
        (FEW, Setting(True, 1, [4.0], True, ["the student"]), ["more epochs"]),
        (FEW, Setting(True, 1, [4.0], True), ["a stronger teacher", "more epochs", "more views"]),
    ],
)
def test_advice_follows_from_the_figures(case, setting, wanted):
    found = verdict_of(**case, setting=setting).advice
    assert [one[: len(start)] for one, start in zip(found, wanted, strict=True)] == wanted


def test_setting_is_read_from_an_untrusted_recipe():
    recipe = {"student": {}, "views": {"num_views": 2}, "distill": [{"temperature": 2.0}, {"temperature": {}}, 3]}
    best = {"best_epoch": 9, "num_epochs": 10}
    assert setting_of(recipe, [best, best]) == Setting(True, 2, [2.0], True)
    assert not setting_of(recipe, [best, best | {"best_epoch": 8}]).last_is_best
    assert setting_of({"student": {"baseline": False}, "views": 1, "distill": 2}, [{}]) == Setting(
        False, temperatures=[]
    )


def test_each_network_is_compared_with_what_it_is_made_from():
    kinds = ("teacher", "alone", "student", "pruned", "pruned-alone", "int8", "int8-unpruned", "int8-unpruned-alone")
    found = {(one.kind, one.against) for one in differences_of({kind: seeds(800) for kind in kinds})}
    assert found == {
        ("teacher", "alone"),
        ("student", "alone"),
        ("pruned", "student"),
        ("pruned", "pruned-alone"),
        ("int8", "pruned"),
        ("int8-unpruned", "student"),
        ("int8-unpruned", "int8-unpruned-alone"),
    }


def test_only_seeds_that_both_have_are_compared():
    outcomes = {"alone": [None, *seeds(800, 700)], "student": [*seeds(900, 850), None]}
    found = between(outcomes, "student", "alone")
    assert (found.num_seeds, found.points) == (1, pytest.approx(5))
    assert between({"alone": [None], "student": seeds(900)}, "student", "alone") is None
