"""Rows are gathered in rank order, and two data-parallel processes fill CRD's memories as a single one does.

The other losses are compared in test_distributed.py.

The test runs this file as a script: its processes are forks, of one that has used neither threads nor autograd.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loss_inputs import make_inputs
from support.two_processes import run_two_processes

from kdpipe.stages.losses.inputs import DatasetInfo, Negatives
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.targets.feature_spec import FeatureSpec

PAIR, SHARD = (("a", "b"),), 3


def crd_state(rows: slice) -> dict[str, Any]:
    """CRD of some rows, for two steps: the sum of the losses, and what is in its memories and Z afterwards."""
    torch.manual_seed(0)
    feature, student, teacher = FeatureSpec("b", "pooled"), torch.randn(2 * SHARD, 5), torch.randn(2 * SHARD, 7)
    others = Negatives({feature: torch.randn(10, 7)}, torch.arange(10) % 4, torch.arange(10) + 10)
    config = CRD(loss="crd", layers=PAIR, dim=4)
    module = config.build({"a": (5,)}, {feature: (7,)}, DatasetInfo(20, 4))
    labels = torch.arange(2 * SHARD) % 4
    whole = make_inputs(labels=labels, student={"a": student}, teacher={feature: teacher})
    inputs = replace(whole, negatives=others).rows(torch.arange(2 * SHARD)[rows])
    losses = [module(inputs) for _ in range(2)]
    buffers = torch.cat([buffer.flatten() for buffer in module.buffers()])
    return {"losses": torch.stack(losses).sum(0).tolist(), "buffers": buffers.tolist()}


def run_process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(rank * SHARD, (rank + 1) * SHARD)
    gathered = all_gather_with_grad(torch.tensor([10 * rank, 10 * rank + 1])).tolist()
    found = {"rows": gathered, "crd": crd_state(rows)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    child = os.fork()
    run_process(int(child == 0), folder)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_two_processes(__file__, tmp_path_factory.mktemp("processes"))


def test_rows_come_in_rank_order(results: list[dict[str, Any]]) -> None:
    assert [found["rows"] for found in results] == [[0, 1, 10, 11]] * 2


def test_memory_banks_equal_those_of_a_single_process(results: list[dict[str, Any]]) -> None:
    alone = crd_state(slice(None))
    assert results[0]["crd"]["buffers"] == results[1]["crd"]["buffers"]
    assert results[0]["crd"]["buffers"] == pytest.approx(alone["buffers"], rel=1e-5, abs=1e-6)
    losses = results[0]["crd"]["losses"] + results[1]["crd"]["losses"]
    assert losses == pytest.approx(alone["losses"], rel=1e-4)


def test_single_process_returns_the_same_tensor() -> None:
    rows = torch.ones(2, 3)
    assert all_gather_with_grad(rows) is rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
