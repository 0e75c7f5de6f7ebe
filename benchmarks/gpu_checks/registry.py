"""The checks by name."""

from __future__ import annotations

from collections.abc import Callable

from gpu_checks import Row, Settings, machine, numbers, published, robustness, speed

FUNCTIONS: dict[str, Callable[[Settings], list[Row]]] = {
    "environment": machine.environment,
    "gpu_tests": machine.gpu_tests,
    "parity": numbers.parity,
    "given_teacher": numbers.given_teacher,
    "losses": numbers.losses,
    "reproducible": robustness.reproducible,
    "memory": robustness.memory,
    "stage_one": speed.stage_one,
    "stage_two": speed.stage_two,
    "qat": numbers.qat,
    "photographs": speed.photographs,
    "second_job": robustness.second_job,
    "two_ranks": robustness.two_ranks,
    "cifar100": published.cifar100,
}
