"""Two data-parallel processes with half of a batch each have the value and the gradient of one that has it all.

The test runs this file as a script: its processes are forks, of one that has used neither threads nor autograd.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loss_inputs import make_inputs
from support.paths import PYTHONPATH
from torch import nn

from kdpipe.stages.losses.base import LossConfig
from kdpipe.stages.losses.inputs import DatasetInfo, Negatives
from kdpipe.stages.losses.relations.cc import CCConfig
from kdpipe.stages.losses.relations.crd import CRDConfig
from kdpipe.stages.losses.relations.pkt import PKTConfig
from kdpipe.stages.losses.relations.rkd import RKDConfig
from kdpipe.stages.losses.relations.sp import SPConfig
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.targets.feature_spec import FeatureSpec

PAIR, SHARD = (("a", "b"),), 3
LOSSES: dict[str, LossConfig] = {
    "sp": SPConfig(loss="sp", layers=PAIR),
    "rkd": RKDConfig(loss="rkd", layers=PAIR),
    "pkt": PKTConfig(loss="pkt", layers=PAIR),
    "cc": CCConfig(loss="cc", layers=PAIR),
}


def loss_and_gradient(name: str, rows: slice) -> dict[str, Any]:
    """The loss of some rows of the batch, and the gradients of all that trains: a linear layer, and the loss's own."""
    torch.manual_seed(0)
    model, images, teacher = nn.Linear(4, 5), torch.randn(2 * SHARD, 4), torch.randn(2 * SHARD, 7)
    wanted = LOSSES[name].required_features({})[0]
    module = LOSSES[name].build({"a": (5,)}, {wanted: (7,)}, DatasetInfo(20, 4))
    loss = module(make_inputs(student={"a": model(images[rows])}, teacher={wanted: teacher[rows]}))
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in (*model.parameters(), *module.parameters())]
    return {"loss": loss.item(), "gradient": torch.cat(gradients).tolist()}


def crd_state(rows: slice) -> dict[str, Any]:
    """CRD of some rows, for two steps: the sum of the losses, and what is in its memories and Z afterwards."""
    torch.manual_seed(0)
    wanted, student, teacher = FeatureSpec("b", "pooled"), torch.randn(2 * SHARD, 5), torch.randn(2 * SHARD, 7)
    others = Negatives({wanted: torch.randn(10, 7)}, torch.arange(10) % 4, torch.arange(10) + 10)
    config = CRDConfig(loss="crd", layers=PAIR, dim=4)
    module = config.build({"a": (5,)}, {wanted: (7,)}, DatasetInfo(20, 4))
    labels = torch.arange(2 * SHARD) % 4
    whole = make_inputs(labels=labels, student={"a": student}, teacher={wanted: teacher})
    inputs = replace(whole, negatives=others).rows(torch.arange(2 * SHARD)[rows])
    losses = [module(inputs) for _ in range(2)]
    buffers = torch.cat([buffer.flatten() for buffer in module.buffers()])
    return {"losses": torch.stack(losses).sum(0).tolist(), "buffers": buffers.tolist()}


def one_process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(rank * SHARD, (rank + 1) * SHARD)
    found: dict[str, Any] = {name: loss_and_gradient(name, rows) for name in LOSSES}
    found["rows"] = all_gather_with_grad(torch.tensor([10 * rank, 10 * rank + 1])).tolist()
    found["crd"] = crd_state(rows)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    child = os.fork()
    one_process(int(child == 0), folder)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    script = [sys.executable, __file__, str(folder)]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_rows_come_in_rank_order(processes: list[dict[str, Any]]) -> None:
    assert [found["rows"] for found in processes] == [[0, 1, 10, 11]] * 2


@pytest.mark.parametrize("name", LOSSES)
def test_each_process_computes_the_value_of_the_whole_batch(name: str, processes: list[dict[str, Any]]) -> None:
    expected = loss_and_gradient(name, slice(None))["loss"]
    assert expected > 0
    assert [found[name]["loss"] for found in processes] == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_mean_gradient_equals_that_of_the_whole_batch(name: str, processes: list[dict[str, Any]]) -> None:
    expected = torch.tensor(loss_and_gradient(name, slice(None))["gradient"])
    mean = torch.tensor([found[name]["gradient"] for found in processes]).mean(0)
    assert torch.allclose(mean, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_single_shard_has_another_value(name: str) -> None:
    assert loss_and_gradient(name, slice(SHARD))["loss"] != pytest.approx(
        loss_and_gradient(name, slice(None))["loss"], rel=0.01
    )


def test_memory_banks_equal_those_of_a_single_process(processes: list[dict[str, Any]]) -> None:
    alone = crd_state(slice(None))
    assert processes[0]["crd"]["buffers"] == processes[1]["crd"]["buffers"]
    assert processes[0]["crd"]["buffers"] == pytest.approx(alone["buffers"], rel=1e-5, abs=1e-6)
    losses = processes[0]["crd"]["losses"] + processes[1]["crd"]["losses"]
    assert losses == pytest.approx(alone["losses"], rel=1e-4)


def test_single_process_returns_the_same_tensor() -> None:
    rows = torch.ones(2, 3)
    assert all_gather_with_grad(rows) is rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
