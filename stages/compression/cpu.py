"""Which CPU this is, and which of the instructions it has that decide how fast INT8 runs: a latency without is no use.

Features go by Linux's names for them. Dot products of bytes are in avx512_vnni, avx_vnni, amx_int8 and, on ARM, in
asimddp and i8mm; without one of them INT8 gains little in onnxruntime.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from stages.machine.cores import num_cores

__all__ = ["cpu_features", "cpu_name", "num_cores"]

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")

CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's name as Linux has it, or what Python knows of it; a machine's architecture at the least."""
    name = next(_values(cpuinfo, "model name"), "")
    return name or platform.processor() or platform.machine() or "unknown CPU"


def cpu_features(cpuinfo: Path = CPUINFO) -> list[str]:
    """Those of `FEATURES` that the first core has; none where there is no /proc/cpuinfo to say so."""
    flags = [*_values(cpuinfo, "flags"), *_values(cpuinfo, "Features")]
    present = flags[0].split() if flags else []
    return [feature for feature in FEATURES if feature in present]


def _values(cpuinfo: Path, key: str) -> Iterator[str]:
    """What stands behind `key`, once for each core."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()
