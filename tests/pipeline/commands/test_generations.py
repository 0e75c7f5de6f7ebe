"""The table of `kdpipe generations`."""

from __future__ import annotations

from typing import Any

import pytest

from kdpipe.pipeline.commands.generations import print_generations


@pytest.mark.parametrize("with_alone", [True, False])  # student.baseline
def test_table_without_students_alone(with_alone: bool, capsys: pytest.CaptureFixture[str]) -> None:
    student: dict[str, Any] = {"accuracy": 0.9, "best_accuracy": 0.91}
    alone = [student] if with_alone else []
    result = {"generation": 1, "teacher": student, "alone": alone, "students": [student]}
    print_generations("mine", {"generations": [result]})
    printed = capsys.readouterr().out
    assert ("student alone" in printed) == with_alone
    assert "generation 1" in printed
