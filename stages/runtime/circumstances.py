"""What a training's last bits depend on besides its inputs: a resumed job takes it from the checkpoint, or says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdpipe.stages.runtime.cpu import num_cores
from kdpipe.stages.runtime.distributed import ProcessGroup
from kdpipe.stages.runtime.events import RunMonitor


def circumstances(device: torch.device, process_group: ProcessGroup) -> dict[str, Any]:
    """Return the circumstances of this process, as JSON."""
    return {
        "threads": torch.get_num_threads(),
        "processes": process_group.count,
        "device": device.type,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def resume_circumstances(
    made_with: Mapping[str, Any], name: str, device: torch.device, process_group: ProcessGroup, monitor: RunMonitor
) -> None:
    """Use the number of CPU threads that a job began with, if the cores allow it, and warn of all else that differs.

    Args:
        made_with: What the checkpoint records; empty in one of an older kdpipe.
        name: The job, for the warning.
        device: The device of this process.
        process_group: The processes that train together.
        monitor: Where to warn.
    """
    threads = made_with.get("threads")
    if type(threads) is int and 1 <= threads <= num_cores() and threads != torch.get_num_threads():
        monitor.warn("device", f"{name} continues with {_threads(threads)}, as it began, for the same results.")
        torch.set_num_threads(threads)
    now = circumstances(device, process_group)
    differing = [
        f"{key} {str(made_with[key])[:40]!r} and now {now[key]!r}"
        for key in now
        if made_with.get(key, now[key]) != now[key]
    ]
    if differing:
        monitor.warn("device", f"{name} began with {', '.join(differing)}: its results may differ in the last digits.")


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
