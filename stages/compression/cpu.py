"""Identify the CPU and its instructions that decide how fast INT8 runs.

Features have Linux's names. Dot products of bytes are in avx512_vnni, avx_vnni, amx_int8 and, on ARM, in asimddp and
i8mm; without one of them INT8 gains little in onnxruntime.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")

CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the CPU's name according to Linux, else Python, at least the machine's architecture."""
    name = next(_values(cpuinfo, "model name"), "")
    return name or platform.processor() or platform.machine() or "unknown CPU"


def cpu_features(cpuinfo: Path = CPUINFO) -> list[str]:
    """Return those of `FEATURES` that the first core has; empty without /proc/cpuinfo."""
    flags = [*_values(cpuinfo, "flags"), *_values(cpuinfo, "Features")]
    present = flags[0].split() if flags else []
    return [feature for feature in FEATURES if feature in present]


def _values(cpuinfo: Path, key: str) -> Iterator[str]:
    """Yield the value of `key` for each core."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()
