"""The table of `kdpipe compare`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdpipe.pipeline.commands.variants.compare import print_compare

ROW = {
    "accuracies": [90.0],
    "interval": None,
    "p": None,
    "validation_mean": None,
    "accuracy_std": None,
    "best_accuracy_mean": 90.0,
    "agreement_mean": None,
    "teacher_kl_mean": None,
    "step_ms": 1.0,
}


@pytest.mark.parametrize("first", ["alone", "kd"])  # "kd" with student.baseline = false
def test_differences_name_the_first_variant(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {**ROW, "name": first, "accuracy_mean": 90.0, "ratio": 1.0},
        {**ROW, "name": "dkd", "accuracy_mean": 91.5, "ratio": 1.2},
    ]
    print_compare("mine", Path("run"), {"teacher": None, "rows": rows, "num_diverged": {}})
    printed = capsys.readouterr().out
    assert f"over {first}" in printed
    assert f"vs {first}" in printed
    assert "+1.50" in printed


def test_validation_images_decide_which_variant_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {**ROW, "name": "kd", "accuracy_mean": 90.0, "ratio": 1.0, "validation_mean": 80.0},
        {
            **ROW,
            "name": "dkd",
            "accuracy_mean": 89.0,
            "ratio": 1.2,
            "validation_mean": 81.0,
            "interval": {"low": -2.0, "high": 0.5, "over": "images"},
            "p": 0.25,
        },
    ]
    print_compare("mine", Path("run"), {"teacher": {"accuracy": 0.95}, "rows": rows, "num_diverged": {}})
    printed = capsys.readouterr().out
    assert printed.index("dkd") < printed.index("  kd ")
    assert "-2.00 to +0.50 over images" in printed and "0.250" in printed
