"""Tests of process groups: one process, launches that are refused, shares of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.distributed import (
    SINGLE,
    ProcessGroup,
    gradient_group,
    group_from_env,
    init_distributed,
    require_single_process,
)


def test_single_process_needs_no_communication() -> None:
    rows = torch.arange(3)
    assert SINGLE.rows(rows) is rows
    assert SINGLE.sync_flags(stop=True, due=False) == (True, False)
    assert SINGLE.on_main(lambda: {1: object}) == {1: object}
    with init_distributed({}) as processes:
        assert processes == SINGLE


def test_processes_connected_anew_get_new_groups(tmp_path: Path) -> None:
    for name in ("first", "second"):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / name}", rank=0, world_size=1)
        ProcessGroup(0, 2).use_device(torch.device("cpu"))
        dist.all_reduce(torch.ones(1), group=gradient_group())  # fails in a group that was destroyed
        dist.destroy_process_group()


def test_array_element_is_a_separate_job() -> None:
    array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "3"), ("MIN", "0"), ("COUNT", "8"))}
    assert group_from_env(array) == SINGLE
    assert group_from_env(array | {"RANK": "1", "WORLD_SIZE": "2"}) == ProcessGroup(1, 2)
    assert group_from_env({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}) == ProcessGroup(2, 4)


def test_missing_master_address_is_an_error() -> None:
    with (
        pytest.raises(RecipeError, match="4 processes .* MASTER_ADDR and MASTER_PORT"),
        init_distributed({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}),
    ):
        pass


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "٣", "9" * 30])
def test_invalid_port_is_an_error(port: str) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.raises(RecipeError, match="MASTER_PORT must be a number from 1 to 65535"), init_distributed(place):
        pass


def test_single_process_command_refuses_several() -> None:
    require_single_process({"RANK": "0", "WORLD_SIZE": "1"}, "kdpipe compress")
    with pytest.raises(RecipeError, match="kdpipe compress runs in one process, and 2 were started"):
        require_single_process({"RANK": "0", "WORLD_SIZE": "2"}, "kdpipe compress")


@pytest.mark.parametrize(("batch_size", "num_samples"), [(33, 200), (1, 200), (32, 1)])
def test_unequal_shares_of_a_batch_are_an_error(batch_size: int, num_samples: int) -> None:
    with pytest.raises(RecipeError, match=f"batch_size is {batch_size}.* multiple of 2, such as "):
        ProcessGroup(0, 2).require_shares(batch_size, num_samples)


def test_shares_of_a_batch_keep_its_order() -> None:
    batch: Tensor = torch.arange(8)
    assert torch.equal(torch.cat([ProcessGroup(rank, 4).rows(batch) for rank in range(4)]), batch)
