"""A student pruned: at once or in steps, each followed by a fine-tuning in which the stores teach it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.compression.latency import measure_latency
from stages.compression.onnx_file import export_onnx
from stages.compression.prune import PruneConfig, Pruned, prune
from stages.compression.sparsity import masks_of
from stages.compression.widths import record_widths
from stages.evaluate import evaluate
from stages.features import Outputs
from stages.fine_tune import Piece, Tutor, fine_tune
from stages.job_folder import JobFolder
from stages.model_file import finished_record, load_finished, save_model
from stages.network import Network, finish
from stages.optim import TrainConfig
from stages.order import derive_seed
from stages.start_file import Start, load_start, save_start, start_path, with_widths
from store import make_folders

LATENCY_BATCH_SIZE = 16
LATENCY_ROUNDS = 20


@dataclass(frozen=True)
class Source:
    """A finished network from which others begin: what it is, and how it is loaded, anew at each call."""

    identity: Mapping[str, Any]
    load: Callable[[], Network]


def finished_source(folder: JobFolder, fresh: Callable[[], Network], needed_by: str) -> Source:
    """The finished network in `folder`; `fresh` builds the unpruned one. Raises RunError, naming the command that makes
    it, where there is none; loading it raises what `load_finished` raises.
    """
    architecture = finished_record(folder, needed_by)["architecture"]

    def load() -> Network:
        network = with_widths(fresh(), architecture.get("widths"))
        load_finished(folder, network.model, network.architecture, needed_by)
        return network

    return Source((folder.result() or {})["identity"], load)


def prune_json(config: PruneConfig) -> dict[str, Any]:
    """What decides a pruning. Keys that are younger than others are left out where they are as they would be without
    them, so that the jobs of older versions stay what they are.
    """
    record, plain = asdict(config), asdict(PruneConfig())
    if config.importance != "taylor":
        del record["importance_batches"]
    if config.steps == 1:
        del record["epochs_per_step"]
    first = ("ratio", "importance", "scope", "max_ratio", "round_to", "exclude")
    return {key: value for key, value in record.items() if key in first or value != plain[key]}


def prune_job(config: PruneConfig, train: TrainConfig, tutor: Tutor, source: Source) -> dict[str, Any]:
    """What decides the result."""
    return tutor.made_from({"prune": prune_json(config)}, source.identity, train)


def prune_student(
    config: PruneConfig, train: TrainConfig, tutor: Tutor, source: Source, kind: str, *, ratio: float | None = None
) -> dict[str, Any]:
    """Prune a student and fine-tune it, in as many steps as `config` says; returns its figures.

    kind: the name of its folder. ratio: the share of the channels, where an earlier search found it.
    Resumes where it was stopped, and a finished one is not touched. Raises ModelError where it cannot be pruned.
    """
    folder = tutor.folder(kind)
    fixed = {} if ratio is None else {"channel_ratio": ratio}
    folder.begin(prune_job(config, train, tutor, source) | fixed)
    if (done := folder.result()) is not None:
        start_path(folder).unlink(missing_ok=True)  # a kill may have come just before that
        return done
    pruner = _Pruner(config, train, tutor, source, ratio)
    network, reached = source.load(), 0.0
    for step in range(1, config.steps):
        network, reached = _intermediate(pruner, folder, network, step, reached=reached, name=_name(kind, tutor.seed))
    start = _start(pruner, folder, network, config.steps, reached)
    piece = Piece(_name(kind, tutor.seed), start.network, folder, train, masks=_masks(config, start.network.model))
    history = fine_tune(piece, tutor)
    figures = finish(folder, start.network, history, tutor.setup, with_onnx=tutor.handed_out, more=start.facts)
    start_path(folder).unlink(missing_ok=True)
    return figures


@dataclass(frozen=True)
class _Pruner:
    """What all steps of a pruning have in common."""

    config: PruneConfig
    train: TrainConfig
    tutor: Tutor
    source: Source
    ratio: float | None

    def __call__(self, network: Network, step: int) -> Pruned:
        config, setup = self.config, self.tutor.setup
        full = self.source.load()
        gradients = None
        if config.importance == "taylor":
            gradients = loss_gradients(network, self.tutor, self.train.batch_size, config.importance_batches)
        return prune(
            network.model.cpu(),
            torch.zeros(2, *setup.image_shape),
            config,
            full=full.model,
            done=step / config.steps,
            ratio=None if self.ratio is None else self.ratio * step / config.steps,
            gradients=gradients,
            latency=latency_share(full.model, setup.image_shape),
        )


def _name(kind: str, seed: int) -> str:
    return f"{kind} student, seed {seed}"


def _intermediate(
    pruner: _Pruner, folder: JobFolder, network: Network, step: int, *, reached: float, name: str
) -> tuple[Network, float]:
    """The network after a step that is not the last one, from its file, or pruned and fine-tuned now; and the share of
    the channels that is gone, `reached` before it.
    """
    own, tutor = JobFolder(folder.path / f"step{step}"), pruner.tutor
    make_folders([own.path])
    if not own.model.exists():
        start = _start(pruner, own, network, step, reached)
        config = replace(pruner.train, epochs=pruner.config.epochs_per_step)
        title = f"{name}, step {step} of {pruner.config.steps}"
        masks = _masks(pruner.config, start.network.model)
        fine_tune(Piece(title, start.network, own, config, masks=masks), tutor)
        save_model(own.model, start.network.model, start.record)
    for leftover in (own.checkpoint, start_path(own)):
        leftover.unlink(missing_ok=True)
    done = load_start(own.model, pruner.source.load())
    return done.network, done.facts["channel_ratio"]


def _start(pruner: _Pruner, folder: JobFolder, network: Network, step: int, reached: float) -> Start:
    """The network as pruned for a step, before its fine-tuning: from its file, or pruned now and kept. `reached`: the
    share of the channels that went before; where a step went beyond its goal, the next has nothing to do.
    """
    setup = pruner.tutor.setup
    if not start_path(folder).exists():
        pruned = pruner(network, step)
        widths = {"widths": record_widths(pruned.model)} if pruner.config.kind == "channels" else {}
        cut = Network(pruned.model, {**network.architecture, **widths}, network.normalise)
        measured = evaluate(cut.model.to(setup.device), setup.test(cut.normalise), setup.device)
        facts = {
            "channel_ratio": max(pruned.ratio, reached),
            "spared": dict(pruned.spared),
            "accuracy_before": measured.accuracy,
        }
        save_start(start_path(folder), Start(cut, facts))
    return load_start(start_path(folder), pruner.source.load())


def _masks(config: PruneConfig, model: nn.Module) -> dict[str, Tensor]:
    """The weights that must stay zero; none where whole channels went."""
    return {} if config.kind == "channels" else masks_of(model)


def loss_gradients(network: Network, tutor: Tutor, batch_size: int, num_batches: int) -> dict[str, Tensor]:
    """The gradient of the loss, summed over the first batches of views, by parameter name: what Taylor importance goes
    by. The network is left without gradients, on the CPU.

    The loss is that of the fine-tuning without the losses on features: their adapters know nothing yet, and neither
    would a gradient that comes through them.
    """
    setup, teaching = tutor.setup, tutor.teaching
    if teaching is not None:
        teaching = teaching.of([loss for loss in teaching.main.losses if loss.on_logits])
    lesson = replace(tutor, teaching=teaching).lesson(network)
    model = network.model.to(setup.device).eval()
    model.zero_grad(set_to_none=True)
    seed = derive_seed(tutor.seed, "importance")
    for batch in islice(lesson.stream(seed, batch_size, epoch=0, step=0, epochs=1), num_batches):
        setup.watch.check()
        losses = lesson.losses(Outputs(model(batch.images), {}), batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    found = {name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None}
    model.train().zero_grad(set_to_none=True)
    model.cpu()
    return found


def latency_share(full: nn.Module, image_shape: tuple[int, int, int]) -> Callable[[nn.Module], float]:
    """Says how long onnxruntime takes for a network, as a share of what it takes for `full`, in turn."""

    example = torch.zeros(2, *image_shape)
    whole: list[bytes] = []  # exported once, when it is first asked for

    def share(candidate: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            paths = {"full": Path(folder) / "full.onnx", "candidate": Path(folder) / "candidate.onnx"}
            if not whole:
                export_onnx(full, example, paths["full"], metadata={})
                whole.append(paths["full"].read_bytes())
            paths["full"].write_bytes(whole[0])
            export_onnx(candidate, example, paths["candidate"], metadata={})
            found = measure_latency(
                paths, image_shape, [LATENCY_BATCH_SIZE], num_rounds=LATENCY_ROUNDS, num_threads=torch.get_num_threads()
            )
        return found["candidate"][LATENCY_BATCH_SIZE].p50_ms / found["full"][LATENCY_BATCH_SIZE].p50_ms

    return share
