"""Rank the networks that a compression offers, and recommend one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdpipe.stages.evaluation.main_metric import METRICS, main_value, metric_of

MIN_SHARE = 0.99
"""The share of the best accuracy that a recommended network reaches, as MLPerf Inference asks of quantized ones."""


def ranked(networks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of networks, the recommended one first.

    Those that reach `MIN_SHARE` of the best accuracy come first, the smallest file ahead; then the others, the most
    accurate ahead. Latency does not count: it differs between machines and from one measurement to the next.

    Args:
        networks: By name, the main metric and `onnx_bytes` of each, and where there are validation images the main
            metric there (`validation_accuracy`), which then decides.
    """
    wanted = MIN_SHARE * max(map(_deciding, networks.values()))

    def place(name: str) -> tuple[bool, float, float]:
        accuracy, size = _deciding(networks[name]), networks[name]["onnx_bytes"]
        return (False, size, -accuracy) if accuracy >= wanted else (True, -accuracy, size)

    return sorted(networks, key=place)


def reason(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why the first of `ranked` is recommended, as a clause."""
    best = max(networks, key=lambda name: _deciding(networks[name]))
    name = ranked(networks)[0]
    if len(networks) == 1:
        return "it is the only one"
    accuracy = f"{100 * _deciding(networks[best]):.2f} %"
    accuracy += " on the validation images" if _validated(networks[best]) else ""
    if name == best:
        return f"no other network reaches {100 * MIN_SHARE:.0f} % of its {accuracy} with a smaller file"
    return (
        f"its file is the smallest of those that reach {100 * MIN_SHARE:.0f} % of the best "
        f"{metric_of(networks[best]).title} ({accuracy}, {best})"
    )


def _deciding(row: Mapping[str, Any]) -> float:
    validated = _validated(row)
    return main_value(row) if validated is None else validated


def _validated(row: Mapping[str, Any]) -> float | None:
    return next((row[key] for name in METRICS if (key := f"validation_{name}") in row), None)
