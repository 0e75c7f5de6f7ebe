"""Two processes agree, and their losses, gradients and batch norms are those of one with the whole batch, also where
they have unequally many rows, or one of them has none.

The tests run this file as a script: its processes are forks, of one that has used neither threads nor autograd.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.paths import PYTHONPATH
from support.tiny_road import STUDENT, tiny_context
from torch import Tensor, nn

from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader, ViewRequest
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import LossConfig
from kdpipe.stages.losses.distillation import DistillationBatch, WeightedLoss
from kdpipe.stages.losses.features.at import ATConfig
from kdpipe.stages.losses.features.hint import HintConfig
from kdpipe.stages.losses.features.nst import NSTConfig
from kdpipe.stages.losses.features.review_kd import ReviewKDConfig
from kdpipe.stages.losses.features.vid import VIDConfig
from kdpipe.stages.losses.inputs import DatasetInfo, Negatives
from kdpipe.stages.losses.logits.dist import DISTConfig
from kdpipe.stages.losses.logits.dkd import DKDConfig
from kdpipe.stages.losses.logits.kd import KDConfig
from kdpipe.stages.losses.logits.logit_mse import LogitMSEConfig
from kdpipe.stages.losses.logits.mlld import MLLDConfig
from kdpipe.stages.losses.logits.nkd import NKDConfig
from kdpipe.stages.losses.relations.cc import CCConfig
from kdpipe.stages.losses.relations.crd import CRDConfig
from kdpipe.stages.losses.relations.pkt import PKTConfig
from kdpipe.stages.losses.relations.rkd import RKDConfig
from kdpipe.stages.losses.relations.sp import SPConfig
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import FINISHED
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.weights import weights_sha256
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.runtime.distributed import (
    SINGLE,
    ProcessGroup,
    init_distributed,
    launched_processes,
    require_single_process,
)
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.feature_spec import compute_statistic
from kdpipe.stages.targets.outputs import DenseTargets
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.step import TrainJob
from kdpipe.stages.training.sync_batch_norm import batch_norm_over_processes
from kdpipe.stages.training.task import TrainingTask
from kdpipe.store import FingerprintMismatch

NUM, SPLIT, CLASSES = 7, 4, 5
"""Samples in all, and those of the first process; the second has fewer."""

PAIR = (("a", "b"),)
LOSSES: dict[str, Callable[[SampleSelection], LossConfig]] = {
    "kd": lambda some: KDConfig(loss="kd", samples=some),
    "dkd": lambda some: DKDConfig(loss="dkd", samples=some),
    "nkd": lambda some: NKDConfig(loss="nkd", samples=some),
    "dist": lambda some: DISTConfig(loss="dist", samples=some),
    "mlld": lambda some: MLLDConfig(loss="mlld", samples=some),
    "logit_mse": lambda some: LogitMSEConfig(loss="logit_mse", samples=some),
    "hint": lambda some: HintConfig(loss="hint", layers=PAIR, samples=some),
    "at": lambda some: ATConfig(loss="at", layers=PAIR, samples=some),
    "nst": lambda some: NSTConfig(loss="nst", layers=PAIR, samples=some),
    "vid": lambda some: VIDConfig(loss="vid", layers=PAIR, samples=some),
    "review_kd": lambda some: ReviewKDConfig(loss="review_kd", layers=PAIR, samples=some),
    "rkd": lambda some: RKDConfig(loss="rkd", layers=PAIR, samples=some),
    "sp": lambda some: SPConfig(loss="sp", layers=PAIR, samples=some),
    "pkt": lambda some: PKTConfig(loss="pkt", layers=PAIR, samples=some),
    "cc": lambda some: CCConfig(loss="cc", layers=PAIR, samples=some),
    "crd": lambda some: CRDConfig(loss="crd", layers=PAIR, dim=4, samples=some),
}
SELECTIONS = {
    "all": SampleSelection(),
    "correct": SampleSelection(filter="correct"),  # which only samples of the first process are
    "hard": SampleSelection(filter="hard", fraction=0.5),
    "known": SampleSelection(),  # the second process's samples have no targets
    "one": SampleSelection(filter="hard", fraction=0.1),
}
NOTHING = ("rkd-one", "sp-one", "pkt-one")
"""One sample has no relations."""

WEIGHED = ("kd", "hint")
CASES = [f"{name}-{samples}" for name in LOSSES for samples in SELECTIONS] + [f"{name}-weighed" for name in WEIGHED]


def selection_of(case: str) -> SampleSelection:
    samples = case.partition("-")[2]
    return SELECTIONS.get(samples) or SampleSelection(filter="hard", fraction=0.7, weighting="entropy")


def taught(case: str, rows: slice) -> dict[str, Any]:
    """A loss of some rows of the batch, and the gradients of all that trains: a convolution, and the loss's own."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    images, maps, logits = torch.randn(NUM, 2, 4, 4), torch.randn(NUM, 6, 4, 4), 2 * torch.randn(NUM, CLASSES)
    labels = logits.argmax(1)
    labels[SPLIT:] = (labels[SPLIT:] + 1) % CLASSES
    config = LOSSES[case.partition("-")[0]](selection_of(case))
    wanted = config.required_features({"a": (4, 4, 4)})
    teacher = {one: compute_statistic(one, maps) for one in wanted}
    shapes = {one: tuple(said.shape[1:]) for one, said in teacher.items()}
    term = WeightedLoss("loss", config, config.build({"a": (4, 4, 4)}, shapes, DatasetInfo(20, CLASSES)))
    others = {one: torch.randn(10, *shape) for one, shape in shapes.items()}
    with batch_norm_over_processes(body), batch_norm_over_processes(term):
        features = body(images[rows])
        known = torch.arange(NUM) < SPLIT if case.endswith("known") else None
        exchange = DistillationBatch(
            ModelOutput(features.mean((2, 3)) @ torch.randn(4, CLASSES), {"a": features}),
            [DenseTargets(logits, teacher).rows(torch.arange(NUM)[rows])],
            [None if known is None else known[rows]],
            labels[rows],
            torch.arange(NUM)[rows],
            FINISHED,
            {"loss": Negatives(others, torch.arange(10) % CLASSES, torch.arange(10) + 10)},
            num_samples=NUM,
        )
        loss = term(exchange, exchange.teachers[0])
    loss.backward()
    trained = [*body.parameters(), *term.parameters()]
    gradients = [torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in trained]
    return {"loss": loss.item(), "gradient": torch.cat(gradients).tolist()}


def normed(rows: slice) -> dict[str, Any]:
    """What batch norm makes of some rows, the gradient of their squares' sum, and of that gradient's squares' sum by
    the input; and what it remembers.
    """
    torch.manual_seed(1)
    norm, maps = nn.BatchNorm2d(3), 5 + 2 * torch.randn(NUM, 3, 2, 2)
    nn.init.uniform_(norm.weight)
    own = maps[rows].clone().requires_grad_()
    before = list(norm.state_dict())
    with batch_norm_over_processes(norm):
        made = norm(own)
        (first,) = torch.autograd.grad((made**3).sum(), own, create_graph=True)
        second, of_weight = torch.autograd.grad(first.square().sum(), [own, norm.weight])
    assert list(norm.state_dict()) == before
    assert "forward" not in vars(norm)
    found = {"made": made, "first": first, "second": second}
    return {name: one.flatten().tolist() for name, one in found.items()} | {
        "of_weight": of_weight.tolist(),
        "buffers": [one.tolist() for one in norm.buffers()],
    }


class Lacking(ImageLoader):
    """Of which some cannot be read."""

    def stream(self, requests: Iterable[ViewRequest], *, require_all: bool = False) -> Iterator[ImageBatch]:
        for seen in super().stream(requests, require_all=require_all):
            kept = seen.indices % 7 != 0
            yield ImageBatch(seen.images[kept], seen.indices[kept])


def trained(processes: ProcessGroup, folder: Path, dropout: float = 0.0) -> tuple[str, list[float]]:
    """The digest of a network's weights after an epoch in this process's memory, and its weights."""
    context = tiny_context(folder)
    model = nn.Sequential(context.build_model(STUDENT.model, 0), nn.Dropout(dropout))
    loader = Lacking(context.train_set, context.device, context.renderer)
    task = TrainingTask(loader, 1, Normalization((0.5,), (0.5,)), fresh_views=True)
    config = TrainConfig(epochs=1, batch_size=50, lr=0.01, checkpoint_every_s=1000)
    job = TrainJob("test", "test", model, task, None, config, 0, JobDir(folder), process_group=processes)
    train(job, torch.device("cpu"), RunMonitor())
    weights = torch.cat([one.flatten().float() for one in model.state_dict().values()])
    return weights_sha256(model), weights.tolist()


def talked(processes: ProcessGroup) -> dict[str, Any]:
    """What the two agree on."""
    first = processes.is_main

    def fail() -> None:
        raise FingerprintMismatch("the job", [("lr", 1, 2)], "Do this.")

    try:
        processes.on_main(fail)
    except FingerprintMismatch as error:
        said = str(error)
    uneven = torch.tensor([10.0 * processes.rank] * (1 + processes.rank), requires_grad=True)
    everyone = all_gather_with_grad(uneven)
    (everyone * torch.tensor([1.0, 2, 3]) * (1 + processes.rank)).sum().backward()
    assert uneven.grad is not None
    none = all_gather_with_grad(torch.ones(2 * processes.rank, 3))
    mean = [torch.full((2, 2), float(processes.rank)), torch.full((3,), 10.0 * processes.rank)]
    processes.average(mean)
    return {
        "agreed": [processes.sync_flags(not first, due=True), processes.sync_flags(stop=False, due=not first)],
        "shared": processes.broadcast_object({"a": [1, None, "ä"]} if first else {}),
        "once": processes.on_main(os.getpid),
        "said": said,
        "gathered": [everyone.tolist(), uneven.grad.tolist(), list(none.shape)],
        "mean": [one.flatten().tolist() for one in mean],
        "rows": processes.rows(torch.arange(5)).tolist(),
    }


def one_process(rank: int, folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(place)
    with init_distributed(os.environ) as processes:
        rows = slice(SPLIT) if rank == 0 else slice(SPLIT, None)
        found = {"talked": talked(processes), "normed": normed(rows), "trained": trained(processes, folder)}
        found["with_dropout"] = trained(processes, folder, dropout=0.2)
        found |= {case: taught(case, rows) for case in CASES}
    assert not dist.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    child = os.fork()
    one_process(int(child == 0), folder, port)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("both")
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    script = [sys.executable, __file__, str(folder)]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_any_process_can_stop_and_the_first_ones_clock_counts(both: list[dict[str, Any]]) -> None:
    assert [one["talked"]["agreed"] for one in both] == [[[True, True], [False, False]]] * 2


def test_what_the_first_says_all_know(both: list[dict[str, Any]]) -> None:
    first, second = (one["talked"] for one in both)
    assert first["shared"] == second["shared"] == {"a": [1, None, "ä"]}
    assert first["once"] == second["once"]


def test_error_of_the_first_process_is_raised_in_all(both: list[dict[str, Any]]) -> None:
    assert [one["talked"]["said"] for one in both] == [
        "the job was made from other inputs - lr: stored 1, wanted 2. Do this."
    ] * 2


def test_unequally_many_rows_are_gathered_with_their_gradients(both: list[dict[str, Any]]) -> None:
    first, second = (one["talked"]["gathered"] for one in both)
    assert first == [[0, 10, 10], [3], [2, 3]]  # once by the first process, twice by the second
    assert second == [[0, 10, 10], [6, 9], [2, 3]]


def test_means_and_shares_are_those_of_all(both: list[dict[str, Any]]) -> None:
    assert [one["talked"]["mean"] for one in both] == [[[0.5] * 4, [5.0] * 3]] * 2
    assert [one["talked"]["rows"] for one in both] == [[0, 1, 2], [3, 4]]


def test_batch_norm_over_processes_equals_whole_batch(both: list[dict[str, Any]]) -> None:
    whole, first, second = normed(slice(None)), both[0]["normed"], both[1]["normed"]
    for name in ("made", "first", "second"):
        assert first[name] + second[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4), name
    added = [one + other for one, other in zip(first["of_weight"], second["of_weight"], strict=True)]
    assert added == pytest.approx(whole["of_weight"], rel=1e-4)
    assert first["buffers"] == second["buffers"]
    for mine, torchs in zip(first["buffers"], whole["buffers"], strict=True):
        assert mine == pytest.approx(torchs, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_loss_and_its_gradient_are_those_of_one_process(case: str, both: list[dict[str, Any]]) -> None:
    whole = taught(case, slice(None))
    assert whole["loss"] > 0 or case in NOTHING
    assert sum(one[case]["loss"] for one in both) / 2 == pytest.approx(whole["loss"], rel=1e-4)
    mean = torch.tensor([one[case]["gradient"] for one in both]).mean(0)
    expected = torch.tensor(whole["gradient"])
    assert torch.allclose(mean, expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item())


def test_all_end_with_the_same_weights_to_the_bit(both: list[dict[str, Any]]) -> None:
    for name in ("trained", "with_dropout"):
        assert both[0][name][0] == both[1][name][0]


def test_unreadable_images_keep_the_weight_of_others(both: list[dict[str, Any]], tmp_path: Path) -> None:
    """Then the processes have unequally many."""
    assert both[0]["trained"][1] == pytest.approx(trained(SINGLE, tmp_path)[1], rel=1e-4, abs=1e-5)


def test_one_process_is_free_of_all_that() -> None:
    rows = torch.arange(3)
    assert SINGLE.rows(rows) is rows
    assert SINGLE.sync_flags(stop=True, due=False) == (True, False)
    assert SINGLE.on_main(lambda: {1: object}) == {1: object}
    with init_distributed({}) as processes:
        assert processes == SINGLE


def test_an_element_of_a_job_array_is_a_job_of_its_own() -> None:
    array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "3"), ("MIN", "0"), ("COUNT", "8"))}
    assert launched_processes(array) == SINGLE
    assert launched_processes(array | {"RANK": "1", "WORLD_SIZE": "2"}) == ProcessGroup(1, 2)
    assert launched_processes({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}) == ProcessGroup(2, 4)


def test_sruns_processes_are_told_what_says_where_they_meet() -> None:
    with (
        pytest.raises(RecipeError, match="4 processes .* MASTER_ADDR and MASTER_PORT"),
        init_distributed({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}),
    ):
        pass


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "٣", "9" * 30])
def test_a_port_that_is_none_is_refused_at_once(port: str) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.raises(RecipeError, match="MASTER_PORT must be a number from 1 to 65535"), init_distributed(place):
        pass


def test_what_runs_in_one_process_says_so_to_several() -> None:
    require_single_process({"RANK": "0", "WORLD_SIZE": "1"}, "kdpipe compress")
    with pytest.raises(RecipeError, match="kdpipe compress runs in one process, and 2 were started"):
        require_single_process({"RANK": "0", "WORLD_SIZE": "2"}, "kdpipe compress")


@pytest.mark.parametrize(("batch_size", "num_samples"), [(33, 200), (1, 200), (32, 1)])
def test_a_batch_that_cannot_be_shared_equally_is_refused(batch_size: int, num_samples: int) -> None:
    with pytest.raises(RecipeError, match=f"batch_size is {batch_size}.* multiple of 2, such as "):
        ProcessGroup(0, 2).require_shares(batch_size, num_samples)


def test_shares_of_a_batch_keep_its_order() -> None:
    batch: Tensor = torch.arange(8)
    assert torch.equal(torch.cat([ProcessGroup(rank, 4).rows(batch) for rank in range(4)]), batch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
