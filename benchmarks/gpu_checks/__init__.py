"""The checks of `gpu_acceptance.py`: each a function from `Settings` to rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from kdpipe.stages.runtime.gpu.device import choose_device

KDPIPE = [sys.executable, "-c", "from kdpipe.pipeline.entry import main; main()"]


@dataclass(frozen=True)
class Settings:
    """What a check gets.

    Attributes:
        device: The device to check, as in a recipe.
        out: A folder for files.
        toy: Whether to take the smallest sizes.
        data: A folder with CIFAR-100.
    """

    device: str
    out: Path
    toy: bool = False
    data: Path | None = None

    def folder(self, name: str) -> Path:
        """Return an empty folder for files of a check."""
        path = self.out / "work" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def size(self, full: int, toy: int) -> int:
        return toy if self.toy else full

    @property
    def torch_device(self) -> torch.device:
        return choose_device(self.device)


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, its limit in words, and whether it is met; None where there is none."""

    what: str
    measured: float | str
    limit: str = ""
    met: bool | None = None


def at_most(what: str, measured: float, limit: float, unit: str = "") -> Row:
    return Row(what, measured, f"at most {limit:g}{unit}", measured <= limit)


def at_least(what: str, measured: float, limit: float, unit: str = "") -> Row:
    return Row(what, measured, f"at least {limit:g}{unit}", measured >= limit)


def holds(what: str, *, is_so: bool) -> Row:
    return Row(what, "yes" if is_so else "no", "yes", is_so)


RECIPE = """
name = "acceptance"
seed = 0
device = "{device}"
num_threads = 1
[data]
name = "digits"
test_share = 0.5
[views]
num_views = {views}
operations = [{{ name = "RandomCrop", padding = 1 }}]
[teacher]
model = {{ name = "cnn", args = {{ width = 16 }} }}
train = {{ epochs = {epochs}, batch_size = 64 }}
[student]
model = {{ name = "cnn", args = {{ width = 6 }} }}
train = {{ epochs = {epochs}, batch_size = 64, checkpoint_every_s = 0.5 }}
seeds = [0]
[[distill]]
loss = "kd"
[[distill]]
loss = "hint"
layers = [["stage2", "stage2"]]
[compress]
prune = {{ ratio = 0.25, round_to = 1 }}
prune_train = {{ epochs = 1, batch_size = 64 }}
quantize_train = {{ epochs = 1, batch_size = 64, lr = 0.002 }}
"""


def write_recipe(settings: Settings, folder: Path, *, device: str | None = None, more: str = "") -> Path:
    """Write the recipe on scikit-learn's digits that most checks run."""
    epochs, views = settings.size(6, 1), settings.size(4, 1)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(device=device or settings.device, epochs=epochs, views=views) + more)
    return path


def kdpipe(*words: str | Path, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line. Raises RuntimeError, with its output, for another exit code than the expected one."""
    done = subprocess.run([*KDPIPE, *map(str, words)], capture_output=True, text=True, check=False)
    if expect is not None and done.returncode != expect:
        raise RuntimeError(f"kdpipe {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-1500:]}")
    return done
