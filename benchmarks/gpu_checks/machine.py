"""The machine: what torch, NVML and kdpipe find, and the project's own tests on the GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_checks import Row, Settings, holds
from kdpipe.stages.compute.settings import fast_precisions
from kdpipe.stages.runtime.cpu import cpu_name, num_cores
from kdpipe.stages.runtime.gpu.nvml import list_gpus

TESTS_S = 140
"""Seconds after which the tests are stopped."""

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


def gpu_tests(settings: Settings) -> Iterator[Row]:
    """Run the project's tests on the device, as many as there is time for."""
    root = Path(__file__).parents[2]
    folders = TESTS[:1] if settings.toy else TESTS
    count = settings.size(min(6, num_cores()), 0)
    command = [sys.executable, "-m", "pytest", "-v", "--maxfail=20", "-n", str(count), "--device", settings.device]
    try:
        limit_s = settings.size(TESTS_S, 3600)
        done = subprocess.run([*command, *folders], cwd=root, capture_output=True, timeout=limit_s, check=False)
        output, code = done.stdout.decode(errors="replace"), done.returncode
    except subprocess.TimeoutExpired as stopped:
        output, code = (stopped.stdout or b"").decode(errors="replace"), None
        yield Row("tests: not run to the end", f"stopped after {stopped.timeout:.0f} s")
    print(output[-100_000:])
    failed = [*dict.fromkeys(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", output))]
    passed = len(re.findall(r"\bPASSED\b", output))
    yield Row("tests passed", str(passed), "some", passed > 0)
    yield Row("tests failed", ", ".join([str(len(failed)), *failed[:5]]), "0", not failed and code in (0, None))
