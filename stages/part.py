"""Which share of a store's units this process computes, by option, torchrun or Slurm. Parts count from 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stages.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`, 0 <= index < count; `origin` says in words where that was read."""

    index: int
    count: int
    origin: str

    def of(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th of `items` from `index` on: together the parts have each item once.

        That holds only if all are handed the same items: every unit of a store, not those that are missing by now.
        """
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f"part {self.index} of {self.count} (counted from 0, from {self.origin})"


WHOLE = Part(0, 1, "the default, as there is no job array or launcher")


def parse_part(text: str) -> Part:
    """The part that `--part` names as i/n. Raises RecipeError for anything else."""
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    index, count = (int(number) for number in numbers.groups()) if numbers else (0, 0)
    if index >= count:
        raise RecipeError(f"--part takes i/n with 0 <= i < n, such as 0/4, not {text!r}: parts count from 0")
    return Part(index, count, "--part")


def part_from_environment(environ: Mapping[str, str]) -> Part:
    """The part that a launcher gives this process; all of it where there is none.

    An element of a Slurm job array has that element's part; the processes that torchrun or srun starts in it share
    it among them. torchrun counts before srun, which may have started it once a node. Raises RecipeError, naming the
    variable, for values that do not fit together.
    """
    array, processes = _slurm_array(environ), _torchrun(environ) or _srun(environ)
    if array and processes:
        index, count = array.index * processes.count + processes.index, array.count * processes.count
        return Part(index, count, f"{array.origin} with {processes.origin}")
    return array or processes or WHOLE


def local_rank(environ: Mapping[str, str]) -> int | None:
    """This process's number among its job's on this machine, as torchrun or Slurm gives it, to choose a device by.

    It may exceed the devices in sight: Slurm can show each task only its own. Raises RecipeError for a broken value.
    """
    return next((_number(environ, name) for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environ), None)


def _torchrun(environ: Mapping[str, str]) -> Part | None:
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    return _ranked(environ, "RANK", "WORLD_SIZE")


def _srun(environ: Mapping[str, str]) -> Part | None:
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script, which runs once, has SLURM_NTASKS and SLURM_PROCID too.
    return _ranked(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else None


def _ranked(environ: Mapping[str, str], rank_name: str, count_name: str) -> Part:
    rank, count = _number(environ, rank_name), _number(environ, count_name)
    if rank >= count:
        raise RecipeError(f"{rank_name} is {rank} and {count_name} is {count}: ranks count from 0 and are below it")
    return Part(rank, count, f"{rank_name} and {count_name}")


def _slurm_array(environ: Mapping[str, str]) -> Part | None:
    """The element's place in its array: `--array=10-16:2` has ids 10, 12, 14, 16, places 0 to 3."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    task_id, first, step, count = (_number(environ, name) for name in names)
    place, off = divmod(task_id - first, max(step, 1))
    # An irregular list, such as --array=1,3,7, cannot be told from these: an id off the grid or beyond it betrays it.
    last = _number(environ, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in environ else None
    if off or not 0 <= place < count or last not in {None, first + max(step, 1) * (count - 1)}:
        raise RecipeError(
            f"SLURM_ARRAY_TASK_ID is {task_id}, in an array of {count} from {first} in steps of {step}, which do not "
            "fit together: submit an even array, such as --array=0-7, or give each its --part"
        )
    return Part(place, count, names[0])


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise RecipeError(f"{name} is not set, but others of its family are: mend the job script, or give --part")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise RecipeError(f"{name} must be a number from 0 on, not {text!r}: mend the job script, or give --part")
    return int(text)
