"""The machine: what torch, NVML and kdpipe find, and the project's own tests on the GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from gpu_checks import Row, Settings, holds
from kdpipe.stages.compute.settings import fast_precisions
from kdpipe.stages.runtime.cpu import cpu_name, num_cores
from kdpipe.stages.runtime.gpu.nvml import list_gpus

TESTS = (
    "tests/stages/compute",
    "tests/stages/views",
    "tests/stages/losses",
    "tests/stages/cache_teacher",
    "tests/stages/training",
    "tests/stages/targets",
)


def environment(settings: Settings) -> list[Row]:
    """Return the versions, the device, and what NVML says of it."""
    device = settings.torch_device
    rows = [
        Row("Python, torch, CUDA", f"{sys.version.split()[0]}, {torch.__version__}, {torch.version.cuda}"),
        Row("CPU", f"{cpu_name()}, {num_cores()} cores"),
        holds("torch finds the device", is_so=device.type == "cpu" or torch.cuda.is_available()),
        Row("precisions in hardware", ", ".join(("float32", *fast_precisions(device)))),
    ]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        rows.append(Row("GPU", f"{found.name}, {found.total_memory >> 20:,} MiB, compute capability {capability}"))
        gpus = list_gpus()
        rows.append(holds("NVML answers", is_so=bool(gpus)))
        rows += [Row(f"NVML's GPU {gpu.index}", f"{gpu}, {gpu.free_bytes >> 20:,} MiB free") for gpu in gpus or ()]
    return rows


def gpu_tests(settings: Settings) -> list[Row]:
    """Run the project's tests on the device."""
    root = Path(__file__).parents[2]
    folders = TESTS[:1] if settings.toy else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--device", settings.device, *folders]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.M)
    return [Row("tests", "; ".join([summary, *failed[:5]]), "all pass", done.returncode == 0)]
