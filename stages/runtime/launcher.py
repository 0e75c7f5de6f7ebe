"""Shares of a store's units, assigned by --part, torchrun or Slurm, and counted from 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kdpipe.stages.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class WorkShard:
    """Part `index` of `count`, 0 <= index < count; `origin` names the option or variables that set it."""

    index: int
    count: int
    origin: str

    def select(self, items: Sequence[T]) -> list[T]:
        """Return every `count`-th of `items` from `index` on: together the parts cover each item once.

        All parts must be given the same items: all units of a store, not only the missing ones.
        """
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f"part {self.index} of {self.count} (counted from 0, from {self.origin})"


ALL = WorkShard(0, 1, "the default, as there is no job array or launcher")


def parse_shard(text: str) -> WorkShard:
    """Parse `--part`, i/n; raises RecipeError if it is malformed."""
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    index, count = (int(number) for number in numbers.groups()) if numbers else (0, 0)
    if index >= count:
        raise RecipeError(f"--part takes i/n with 0 <= i < n, such as 0/4, not {text!r}: parts count from 0")
    return WorkShard(index, count, "--part")


def shard_from_env(environ: Mapping[str, str]) -> WorkShard:
    """Return the part that a launcher assigns to this process; all of it without a launcher.

    An element of a Slurm job array has that element's part, which the processes of torchrun or srun in it share.
    torchrun takes precedence over srun, which may have started it once a node. Raises RecipeError, naming the variable,
    for invalid values.
    """
    array, processes = _slurm_array(environ), _ranked(environ)
    if array and processes:
        index, count = array.index * processes.count + processes.index, array.count * processes.count
        return WorkShard(index, count, f"{array.origin} with {processes.origin}")
    return array or processes or ALL


def local_rank(environ: Mapping[str, str]) -> int | None:
    """Return this process's number on this machine, from torchrun or Slurm, for choosing a device.

    It may exceed the number of visible devices: Slurm can show each task only its own. Raises RecipeError if invalid.
    """
    return next((_number(environ, name) for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environ), None)


def _ranked(environ: Mapping[str, str]) -> WorkShard | None:
    """Return this process's part among those of torchrun or srun; None without them."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        rank_name, count_name = "RANK", "WORLD_SIZE"
    elif "SLURM_STEP_NUM_TASKS" in environ:  # only srun sets it: a batch script, which runs once, has SLURM_PROCID too
        rank_name, count_name = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    else:
        return None
    rank, count = _number(environ, rank_name), _number(environ, count_name)
    if rank >= count:
        raise RecipeError(f"{rank_name} is {rank} and {count_name} is {count}: ranks count from 0 and are below it")
    return WorkShard(rank, count, f"{rank_name} and {count_name}")


def _slurm_array(environ: Mapping[str, str]) -> WorkShard | None:
    """Return the element's index in its array: `--array=10-16:2` has ids 10, 12, 14, 16 and indices 0 to 3."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    task_id, first, step, count = (_number(environ, name) for name in names)
    index, offset = divmod(task_id - first, max(step, 1))
    # An irregular list, such as --array=1,3,7, is detected by ids off the grid or beyond it.
    last = _number(environ, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in environ else None
    if offset or not 0 <= index < count or last not in {None, first + max(step, 1) * (count - 1)}:
        raise RecipeError(
            f"SLURM_ARRAY_TASK_ID is {task_id}, in an array of {count} from {first} in steps of {step}, which is "
            "inconsistent: submit a regular array, such as --array=0-7, or give each its --part"
        )
    return WorkShard(index, count, names[0])


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise RecipeError(f"{name} is not set, but related variables are: fix the job script, or give --part")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise RecipeError(f"{name} must be a number from 0 on, not {text!r}: fix the job script, or give --part")
    return int(text)
