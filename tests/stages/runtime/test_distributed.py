"""Two processes agree, and their losses, gradients and batch norms are those of one with the whole batch, also where
they have unequally many rows, or one of them has none.

The tests run this file as a script: its processes are forks, of one that has used neither threads nor autograd.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import batch_norm_kernels, user_losses
from support.device import DEVICE
from support.tiny_run import STUDENT, tiny_context
from support.two_processes import free_port, run_two_processes
from torch import Tensor, nn

from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader, ViewRequest
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.inputs import DatasetInfo, Negatives
from kdpipe.stages.losses.registry import LOSSES as LOSS_CLASSES
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import FINISHED
from kdpipe.stages.losses.user_loss import as_loss
from kdpipe.stages.losses.weighted import DistillationBatch, WeightedLoss
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.tokens import CAM, PRE_LOGITS
from kdpipe.stages.models.weights.state_dict import weights_sha256
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.runtime.distributed import (
    SINGLE,
    ProcessGroup,
    init_distributed,
)
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.sync_batch_norm import batch_norm_over_processes
from kdpipe.stages.targets.feature_spec import compute_statistic, shape_of
from kdpipe.stages.targets.outputs import DenseTargets
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.optimization.gradients import GradientAverage
from kdpipe.stages.training.task import TrainingTask
from kdpipe.stages.workspace import Workspace
from kdpipe.store import FingerprintMismatch

NUM, SPLIT, CLASSES = 7, 4, 5
"""Samples in all, and those of the first process; the second has fewer."""
PAIR = (("a", "b"),)
CLIPPED: dict[str, Any] = {"optimizer": "adam", "clip_grad": 0.1, "ema_decay": 0.9, "decay_norm_and_bias": False}
CLIPPED |= {"class_weights": "balanced", "sampler": "balanced"}
ON_LOGITS = ("kd", "dkd", "nkd", "dist", "wsld", "mlld", "logit_mse", "gkl", "ttm", "wttm", "hard_distillation")
ON_LOGITS += ("binary_kd", "wkd_l")
ON_MAPS = ("hint", "at", "ofd", "srd", "nst", "vid", "review_kd", "rkd", "sp", "pkt", "cc", "cwd", "wkd_f", "pefd")
ON_MAPS += ("vkd", "ab", "ft", "cosine", "cat_kd")
WIDE = (("e", "b"), ("f", "d"))
"""Student layers with the teacher's channels."""
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ON_LOGITS},
    **{name: {"layers": PAIR} for name in ON_MAPS},
    **{name: {"layers": WIDE} for name in ("fsp", "kdsvd")},
    "simkd": {"layers": WIDE[:1]},
    "srrl": {"layer": "a"},
    "crd": {"layers": PAIR, "dim": 4},
}
LOSSES: dict[str, Callable[[SampleSelection], Loss]] = {
    **{
        name: lambda some, name=name, own=own: LOSS_CLASSES.get(name)(loss=name, samples=some, **own)
        for name, own in OPTIONS.items()
    },
    "function": lambda some: as_loss(user_losses.logit_mae, "function")(samples=some),
    "of_batch": lambda some: as_loss(user_losses.batch_spread, "of_batch")(samples=some),
    "module": lambda some: as_loss(user_losses.Projected, "module")(samples=some),
    "means": lambda some: as_loss(user_losses.ChannelMeans, "means")(layers=PAIR, samples=some),
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


def student_features(maps: Tensor) -> dict[str, Tensor]:
    """The features by layer, from maps [B, 4, 4, 4]."""
    weights = torch.randn(4, CLASSES + 12, generator=torch.Generator().manual_seed(2))
    cam, one, other = torch.einsum("bchw,cd->bdhw", maps, weights).split([CLASSES, 6, 6], 1)
    return {"a": maps, f"a.{CAM}": cam, "e": one, "f": other, PRE_LOGITS: maps.mean((2, 3))}


STUDENT_SHAPES = {
    layer: tuple(features.shape[1:]) for layer, features in student_features(torch.ones(1, 4, 4, 4)).items()
}


def loss_and_gradient(case: str, rows: slice) -> dict[str, Any]:
    """A loss of some rows of the batch, and the gradients of all that trains: a convolution, and the loss's own."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    images, maps, logits = torch.randn(NUM, 2, 4, 4), torch.randn(NUM, 6, 4, 4), 2 * torch.randn(NUM, CLASSES)
    labels = logits.argmax(1)
    labels[SPLIT:] = (labels[SPLIT:] + 1) % CLASSES
    config = LOSSES[case.partition("-")[0]](selection_of(case))
    required = config.required_features(STUDENT_SHAPES)
    sources = {"d": maps.square(), PRE_LOGITS: maps.mean((2, 3)), f"b.{CAM}": maps[:, :CLASSES]}
    teacher = {
        spec: torch.randn(CLASSES, 7) if spec.is_head else compute_statistic(spec, sources.get(spec.layer, maps))
        for spec in required
    }
    shapes = {spec: shape_of(spec, feature) for spec, feature in teacher.items()}
    term = WeightedLoss("loss", config, config.build(STUDENT_SHAPES, shapes, DatasetInfo(20, CLASSES)))
    negatives = {spec: torch.randn(10, *shape) for spec, shape in shapes.items()}
    with batch_norm_over_processes(body), batch_norm_over_processes(term):
        features = body(images[rows])
        known = torch.arange(NUM) < SPLIT if case.endswith("known") else None
        batch = DistillationBatch(
            ModelOutput(features.mean((2, 3)) @ torch.randn(4, CLASSES), student_features(features)),
            [DenseTargets(logits, teacher).rows(torch.arange(NUM)[rows])],
            [None if known is None else known[rows]],
            labels[rows],
            torch.arange(NUM)[rows],
            FINISHED,
            {"loss": Negatives(negatives, torch.arange(10) % CLASSES, torch.arange(10) + 10)},
            global_batch_size=NUM,
        )
        loss = term(batch, batch.teachers[0])
    loss.backward()
    trained = [*body.parameters(), *term.parameters()]
    gradients = [torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in trained]
    return {"loss": loss.item(), "gradient": torch.cat(gradients).tolist()}


def batch_norm_results(rows: slice) -> dict[str, Any]:
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


def results_by_kernels(rows: slice) -> dict[str, Any]:
    """Batch norm's results with the kernels for GPUs, which formulas play here."""
    torch.manual_seed(1)
    norm, maps = nn.BatchNorm2d(3), 5 + 2 * torch.randn(NUM, 3, 2, 2)
    nn.init.uniform_(norm.weight)
    own = maps[rows].clone().requires_grad_()
    with batch_norm_kernels.played(), batch_norm_over_processes(norm, twice_differentiable=False):
        made = norm(own)
        (made**3).sum().backward()
        assert ("_Normalize" in str(made.grad_fn)) == dist.is_initialized()
    found = {"made": made, "of_maps": own.grad, "of_weight": norm.weight.grad, "of_bias": norm.bias.grad}
    buffers = {name: one.tolist() for name, one in norm.named_buffers()}
    return {name: [] if one is None else one.flatten().tolist() for name, one in found.items()} | buffers


class PartlyUnreadableLoader(ImageLoader):
    """A loader that leaves out every seventh image, as unreadable."""

    def stream(self, requests: Iterable[ViewRequest], *, require_all: bool = False) -> Iterator[ImageBatch]:
        for seen in super().stream(requests, require_all=require_all):
            kept = seen.indices % 7 != 0
            yield ImageBatch(seen.images[kept], seen.indices[kept])


def train_digest(
    processes: ProcessGroup, folder: Path, dropout: float = 0.0, **settings: Any
) -> tuple[str, list[float]]:
    """The digest of a network's weights after an epoch in this process's memory, and its weights."""
    folder.mkdir(exist_ok=True)
    context = tiny_context(folder)
    model = nn.Sequential(context.build_model(STUDENT.model, 0), nn.Dropout(dropout))
    loader = PartlyUnreadableLoader(context.train_set, context.device, context.renderer)
    task = TrainingTask(loader, 1, Normalization((0.5,), (0.5,)), fresh_views=True)
    common = {"epochs": 1, "batch_size": 50, "lr": 0.01, "checkpoint_every_s": 1000, "precision": "float32"}
    config = TrainConfig(**{**common, **settings})
    job = TrainJob("test", "test", model, task, None, config, 0, JobDir(folder), process_group=processes)
    train(job, DEVICE, RunMonitor())
    weights = torch.cat([one.flatten().float() for one in model.state_dict().values()])
    return weights_sha256(model), weights.tolist()


def agreement(processes: ProcessGroup) -> dict[str, Any]:
    """Return what both processes must agree on."""
    first = processes.is_main

    def fail() -> None:
        raise FingerprintMismatch("the job", [("lr", 1, 2)], "Do this.")

    try:
        processes.on_main(fail)
    except FingerprintMismatch as error:
        message = str(error)
    uneven = torch.tensor([10.0 * processes.rank] * (1 + processes.rank), requires_grad=True)
    everyone = all_gather_with_grad(uneven)
    (everyone * torch.tensor([1.0, 2, 3]) * (1 + processes.rank)).sum().backward()
    assert uneven.grad is not None
    none = all_gather_with_grad(torch.ones(2 * processes.rank, 3))
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    average = GradientAverage(weights, processes)
    with average.sent_early():  # the first process lacks the last one's, which is sent first
        torch.cat([(index + 1) * one for index, one in enumerate(weights[: 1 + processes.rank])]).sum().backward()
    averaged = average.finish({"kd": torch.tensor(float(processes.rank))})
    return {
        "agreed": [processes.sync_flags(not first, due=True), processes.sync_flags(stop=False, due=not first)],
        "shared": processes.broadcast_object({"a": [1, None, "ä"]} if first else {}),
        "once": processes.on_main(os.getpid),
        "error": message,
        "gathered": [everyone.tolist(), uneven.grad.tolist(), list(none.shape)],
        "averaged": [averaged["kd"].item(), *(None if one.grad is None else one.grad.tolist() for one in weights)],
        "rows": processes.rows(torch.arange(5)).tolist(),
    }


def waits(processes: ProcessGroup, folder: Path, *, stop: bool) -> list[Any]:
    """Wait for the turn of another job until it ends, or the second process gets a signal; return what was seen."""
    workspace, looks, said = Workspace(folder), [0], []
    with ExitStack() as other, suppress(StoppedEarly):
        if processes.is_main:
            other.enter_context(workspace.turn("train-teacher", "teacher", {}, RunMonitor()))
        processes.on_main(int)  # both begin when it is taken

        def should_stop() -> bool:
            looks[0] += 1
            if looks[0] == 3 and not stop:
                other.close()
            return stop and looks[0] == 3 and not processes.is_main

        monitor = RunMonitor(lambda event: said.append(event.job.partition(" that ")[0]), should_stop)
        with workspace.turn("train-teacher", "teacher", {}, monitor, processes):
            said.append("begun")
    return [looks[0], *said]


def run_process(rank: int, folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(place)
    with init_distributed(os.environ) as processes:
        rows = slice(SPLIT) if rank == 0 else slice(SPLIT, None)
        found = {
            "agreement": agreement(processes),
            "batch_norm": batch_norm_results(rows),
            "by_kernels": results_by_kernels(rows),
            "by_kernels_of_one": results_by_kernels(slice(0) if rank == 0 else slice(None)),
            "trained": train_digest(processes, folder),
        }
        found["waits"] = [waits(processes, folder, stop=stop) for stop in (False, True)]
        found["with_dropout"] = train_digest(processes, folder / "dropout", dropout=0.2)
        found["clipped"] = train_digest(processes, folder / "clipped", **CLIPPED)
        found |= {case: loss_and_gradient(case, rows) for case in CASES}
    assert not dist.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    port = free_port()
    child = os.fork()
    run_process(int(child == 0), folder, port)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_two_processes(__file__, tmp_path_factory.mktemp("results"))


def test_any_process_stops_and_main_clock_saves(results: list[dict[str, Any]]) -> None:
    assert [one["agreement"]["agreed"] for one in results] == [[[True, True], [False, False]]] * 2


def test_all_processes_wait_for_another_job_and_stop_together(results: list[dict[str, Any]]) -> None:
    told = "waits for the teacher"
    assert [one["waits"] for one in results] == [[[3, told, "begun"], [3, told]], [[3, "begun"], [3]]]


def test_value_of_main_process_is_broadcast(results: list[dict[str, Any]]) -> None:
    first, second = (one["agreement"] for one in results)
    assert first["shared"] == second["shared"] == {"a": [1, None, "ä"]}
    assert first["once"] == second["once"]


def test_error_of_main_process_is_raised_in_all(results: list[dict[str, Any]]) -> None:
    assert [one["agreement"]["error"] for one in results] == [
        "the job was made from other inputs - lr: stored 1, wanted 2. Do this."
    ] * 2


def test_unequal_row_counts_are_gathered_with_gradients(results: list[dict[str, Any]]) -> None:
    first, second = (one["agreement"]["gathered"] for one in results)
    assert first == [[0, 10, 10], [3], [2, 3]]  # once by the first process, twice by the second
    assert second == [[0, 10, 10], [6, 9], [2, 3]]


def test_gradients_of_one_process_are_averaged_in_all(results: list[dict[str, Any]]) -> None:
    assert [one["agreement"]["averaged"] for one in results] == [[0.5, [1, 1], [1, 1], None]] * 2


def test_row_shares(results: list[dict[str, Any]]) -> None:
    assert [one["agreement"]["rows"] for one in results] == [[0, 1, 2], [3, 4]]


def test_batch_norm_over_processes_equals_whole_batch(results: list[dict[str, Any]]) -> None:
    whole, first, second = batch_norm_results(slice(None)), results[0]["batch_norm"], results[1]["batch_norm"]
    for name in ("made", "first", "second"):
        assert first[name] + second[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4), name
    added = [one + other for one, other in zip(first["of_weight"], second["of_weight"], strict=True)]
    assert added == pytest.approx(whole["of_weight"], rel=1e-4)
    assert first["buffers"] == second["buffers"]
    for ours, expected in zip(first["buffers"], whole["buffers"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["by_kernels", "by_kernels_of_one"])
def test_batch_norm_by_kernels_equals_whole_batch(case: str, results: list[dict[str, Any]]) -> None:
    whole, first, second = results_by_kernels(slice(None)), results[0][case], results[1][case]
    for name in ("made", "of_maps"):
        assert first[name] + second[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4), name
    for name in ("of_weight", "of_bias"):
        added = [one + other for one, other in zip(first[name], second[name], strict=True)]
        assert added == pytest.approx(whole[name], rel=1e-4), name
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert first[name] == second[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_one_process(case: str, results: list[dict[str, Any]]) -> None:
    whole = loss_and_gradient(case, slice(None))
    loss = sum(result[case]["loss"] for result in results) / 2
    mean = torch.tensor([result[case]["gradient"] for result in results]).mean(0)
    expected = torch.tensor(whole["gradient"])
    if case in NOTHING:  # loss and gradient are rounding errors
        assert max(abs(loss), abs(whole["loss"]), mean.abs().max().item(), expected.abs().max().item()) < 1e-9
        return
    assert whole["loss"] != 0
    assert loss == pytest.approx(whole["loss"], rel=1e-4)
    assert torch.allclose(mean, expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item())


def test_weights_are_bit_equal_in_all_processes(results: list[dict[str, Any]]) -> None:
    for name in ("trained", "with_dropout"):
        assert results[0][name][0] == results[1][name][0]


def test_unreadable_images_keep_the_weight_of_others(results: list[dict[str, Any]], tmp_path: Path) -> None:
    """Then the processes have unequally many."""
    assert results[0]["trained"][1] == pytest.approx(train_digest(SINGLE, tmp_path)[1], rel=1e-4, abs=1e-5)


def test_clipped_and_averaged_training_is_that_of_one_process(results: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = (one["clipped"] for one in results)
    assert first[0] == second[0]
    assert first[1] == pytest.approx(train_digest(SINGLE, tmp_path, **CLIPPED)[1], rel=1e-3, abs=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
