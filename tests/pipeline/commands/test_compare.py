"""The table of `kdpipe compare`."""

from __future__ import annotations

import pytest

from kdpipe.pipeline.commands.compare import print_compare

ROW = {
    "accuracies": [90.0],
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
    print_compare("mine", {"teacher": None, "rows": rows, "num_diverged": {}})
    printed = capsys.readouterr().out
    assert f"over {first}" in printed
    assert f"vs {first}" in printed
    assert "+1.50" in printed
