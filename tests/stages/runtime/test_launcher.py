"""Tests of shares of units for all launchers."""

import pytest

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.launcher import WorkShard, local_rank, parse_shard, shard_from_env


def array(task_id, first, last, step, count):
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    numbers = (task_id, first, last, step, count)
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in zip(names, numbers, strict=True)}


def srun(rank, count):
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(count)}


def torchrun(rank, count):
    return {"RANK": str(rank), "WORLD_SIZE": str(count)}


def place(environ):
    part = shard_from_env(environ)
    return part.index, part.count


@pytest.mark.parametrize("count", [1, 3, 4, 20])
def test_parts_cover_each_item_once(count):
    parts = [parse_shard(f"{index}/{count}").select(range(10)) for index in range(count)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_part_names_its_origin():
    assert parse_shard("1/4") == WorkShard(1, 4, "--part")
    assert str(shard_from_env(array(1, 0, 3, 1, 4))) == "part 1 of 4 (counted from 0, from SLURM_ARRAY_TASK_ID)"
    assert shard_from_env(torchrun(0, 2)).origin == "RANK and WORLD_SIZE"
    assert shard_from_env(srun(0, 2)).origin == "SLURM_PROCID and SLURM_STEP_NUM_TASKS"
    both = shard_from_env({**array(1, 0, 3, 1, 4), **torchrun(0, 2)})
    assert both.origin == "SLURM_ARRAY_TASK_ID with RANK and WORLD_SIZE"


@pytest.mark.parametrize("text", ["4/4", "0/0", "-1/4", "1", "1/", "a/b", "", " 0/4", "0/4\n", "1/2/3", "1.0/2", "١/٤"])
def test_malformed_part_is_an_error(text):
    with pytest.raises(RecipeError) as caught:
        parse_shard(text)
    assert str(caught.value) == (f"--part takes i/n with 0 <= i < n, such as 0/4, not {text!r}: parts count from 0")


def test_without_launcher_a_process_computes_all():
    assert place({}) == (0, 1)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (array(0, 0, 7, 1, 8), (0, 8)),
        (array(8, 1, 8, 1, 8), (7, 8)),
        (array(14, 10, 16, 2, 4), (2, 4)),
        (array(5, 5, 5, 1, 1), (0, 1)),
    ],
)
def test_array_element_has_its_index(environ, expected):
    assert place(environ) == expected


def test_batch_script_is_one_process_whatever_its_tasks():
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert place(batch) == (0, 1)
    assert place({**batch, **array(2, 0, 3, 1, 4)}) == (2, 4)


def test_torchrun_takes_precedence_over_srun():
    assert place({**srun(1, 2), **torchrun(11, 16)}) == (11, 16)


@pytest.mark.parametrize("launcher", [srun, torchrun])
def test_processes_share_the_part_of_their_array_element(launcher):
    places = [place({**array(task_id, 1, 3, 1, 3), **launcher(rank, 2)}) for task_id in (1, 2, 3) for rank in (0, 1)]
    assert places == [(index, 6) for index in range(6)]


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "^RANK must be .* not 'one'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "^WORLD_SIZE must be .* not ''"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "^RANK must be"),
        ({"RANK": "0"}, "^WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "^RANK is not set"),
        (torchrun(2, 2), "^RANK is 2 and WORLD_SIZE is 2"),
        (torchrun(0, 0), "^RANK is 0 and WORLD_SIZE is 0"),
        (srun(4, 4), "^SLURM_PROCID is 4 and SLURM_STEP_NUM_TASKS is 4"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "^SLURM_PROCID is not set"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "^SLURM_ARRAY_TASK_MIN is not set"),
        (array(9, 1, 8, 1, 8), "^SLURM_ARRAY_TASK_ID is 9, in an array of 8 from 1"),
        (array(0, 1, 8, 1, 8), "^SLURM_ARRAY_TASK_ID is 0"),
        (array(11, 10, 16, 2, 4), "^SLURM_ARRAY_TASK_ID is 11"),
    ],
)
def test_invalid_variables_are_named(environ, named):
    with pytest.raises(RecipeError, match=named):
        shard_from_env(environ)


@pytest.mark.parametrize("task_id", [1, 3, 7])
def test_irregular_array_is_an_error_in_each_element(task_id):
    with pytest.raises(RecipeError, match="submit a regular array, such as --array=0-7, or give each its --part"):
        shard_from_env(array(task_id, 1, 7, 1, 3))


def test_local_rank_prefers_torchrun():
    assert local_rank({}) is None
    assert local_rank({"SLURM_LOCALID": "3"}) == 3
    assert local_rank({"SLURM_LOCALID": "0", "LOCAL_RANK": "2"}) == 2
    with pytest.raises(RecipeError, match="^LOCAL_RANK must be"):
        local_rank({"LOCAL_RANK": "x", "SLURM_LOCALID": "3"})
