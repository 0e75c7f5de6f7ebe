"""Configuration of training, and the optimizer and learning rate that it describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from kdpipe.stages.compute.settings import MemoryFormat, Precision
from kdpipe.stages.config import Count, PathStr, section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.plugins.user_code import PREFIX as USER_PREFIX
from kdpipe.stages.training.optimization.clipping import ClipMode
from kdpipe.stages.training.optimization.keywords import named_keywords
from kdpipe.stages.training.optimization.optimizers import (
    OPTIMIZERS,
    find_optimizer,
    make_optimizer,
    optimizer_keywords,
)
from kdpipe.stages.training.optimization.param_groups import parameter_groups
from kdpipe.stages.training.optimization.schedules import SCHEDULES, make_schedule
from kdpipe.stages.training.optimization.timm_glue import PREFIX

IMPORTED = (PREFIX, USER_PREFIX)
"""How names begin that are checked only where they are used: a run can be read without timm and the user's modules."""

FUSED = ("sgd", "adam", "adamw")
"""Optimizers of torch that have a fused kernel on CUDA."""

NEVER_REFUSED = {
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "decay_norm_and_bias",
    "schedule",
    "min_lr",
    "warmup_epochs",
    "clip_grad",
    "ema_decay",
    "checkpoint_every_s",
}
"""Keys of which no built-in optimizer or schedule, and no network, refuses a value that is valid by itself."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
ClassWeight = Annotated[float, Field(ge=0, le=1e6)]


def _completed(names: Iterable[str]) -> Any:
    """Return what makes editors complete these names, where others are valid too."""
    return Field(json_schema_extra={"anyOf": [{"enum": list(names)}, {"type": "string"}]})


@section
class TrainConfig:
    """Configuration of training: epochs, batches, optimizer and schedule.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Samples per step; batches are full, and the few samples left over differ from epoch to epoch.
        optimizer: One of torch.optim ("sgd", "adamw", "adam", ...), "timm:NAME", "python:module:factory", or a
            registered one.
        lr: The highest learning rate.
        momentum: Momentum of the optimizers that have it, as SGD.
        nesterov: Whether to use Nesterov momentum, where the optimizer can.
        betas: The betas of Adam and its relatives; by default the optimizer's own.
        weight_decay: The weight decay, in units of the learning rate.
        optimizer_args: Further arguments of the optimizer.
        decay_norm_and_bias: Whether norms, biases and other vectors have weight decay too.
        layer_decay: The factor of the learning rate from each layer to the one before it; by default all have the same.
        schedule: "cosine", "linear" and "polynomial" fall to min_lr; "step" multiplies by gamma at the milestones;
            "constant"; or "timm:NAME", "python:module:function", or a registered one.
        schedule_args: Further arguments of the schedule.
        min_lr: The learning rate to which schedules fall.
        warmup_epochs: Epochs over which the rate rises linearly to lr.
        milestones: The epochs at which a step schedule multiplies the rate by gamma.
        gamma: The factor of a step schedule.
        clip_grad: The limit to which gradients are clipped; by default they are not.
        clip_grad_mode: "norm" limits the norm of all gradients together, "value" each of their values, "agc" each
            unit's norm as a fraction of that of its weights (timm).
        ema_decay: The decay of an exponential moving average of the weights, which is what is evaluated and exported.
        class_weights: Factors of the cross entropy with the labels, one for each class, or "balanced", the inverse of
            the classes' sizes; scaled to a mean of 1 over the training samples. By default all classes count alike.
        sampler: "shuffle" has each sample once in an epoch; "balanced" has each class equally often, and repeats
            samples of small classes.
        precision: "bfloat16" and "float16" are mixed precision, "tf32" rounds products of float32 on CUDA. "auto" is
            mixed precision on CUDA (bfloat16, else float16) and float32 on CPUs; long trainings on a CPU with bfloat16
            take it if it is clearly faster in a short trial.
        memory_format: Memory format of images and convolutions. "auto" is channels_last in mixed precision and
            contiguous elsewhere; long trainings on a CPU take what is faster in the trial.
        compile: Whether torch.compile compiles the forward and backward pass of the network and, where possible, of the
            losses; on CUDA with CUDA graphs.
        checkpoint_every_s: Seconds between checkpoints; it never changes the result.
    """

    later_keys: ClassVar[tuple[str, ...]] = (
        "betas",
        "optimizer_args",
        "decay_norm_and_bias",
        "layer_decay",
        "schedule_args",
        "min_lr",
        "clip_grad",
        "clip_grad_mode",
        "ema_decay",
        "class_weights",
        "sampler",
        "memory_format",
        "compile",
    )

    epochs: Annotated[int, Field(ge=0, le=10**6)] = 20
    batch_size: Count = 128
    optimizer: Annotated[PathStr, _completed(OPTIMIZERS.builtin)] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    momentum: Fraction = 0.9
    nesterov: bool = False
    betas: tuple[Fraction, ...] = ()
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 5e-4
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    decay_norm_and_bias: bool = True
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Annotated[PathStr, _completed(SCHEDULES.builtin)] = "cosine"
    schedule_args: dict[str, Any] = field(default_factory=dict)
    min_lr: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    milestones: tuple[Count, ...] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip_grad: Annotated[float, Field(gt=0, le=1e6)] | None = None
    clip_grad_mode: ClipMode = "norm"
    ema_decay: Fraction | None = None
    class_weights: Literal["balanced"] | tuple[ClassWeight, ...] | None = None
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    precision: Literal["auto", Precision] = "auto"
    memory_format: Literal["auto", MemoryFormat] = "auto"
    compile: bool = False
    checkpoint_every_s: Annotated[float, Field(ge=0, le=1e9)] = 30.0

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above lr = {self.lr:g}: lower it")

    def source_digests(self) -> dict[str, str]:
        """Return the digests of the user's own optimizer and schedule, which are part of what decides a job."""
        digests = {
            "optimizer_source_sha256": None if _is_timm(self.optimizer) else OPTIMIZERS.source_sha256(self.optimizer),
            "schedule_source_sha256": None if _is_timm(self.schedule) else SCHEDULES.source_sha256(self.schedule),
        }
        return {key: digest for key, digest in digests.items() if digest}


def build_optimizer(config: TrainConfig, modules: nn.ModuleDict) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters of the student and of the losses' adapters.

    Raises:
        RecipeError: There is no such optimizer, it has no such argument, or it cannot be used.
    """
    for key, value in {"clip_grad": config.clip_grad, "compile": config.compile}.items():
        if config.optimizer == "dot" and value:
            raise RecipeError(f"train.{key} is for one gradient a step, and optimizer 'dot' has two: leave it out.")
    groups = parameter_groups(modules, decay_norm_and_bias=config.decay_norm_and_bias, layer_decay=config.layer_decay)
    offered = _offered(config)
    on_cuda = all(parameter.is_cuda for parameter in modules.parameters())
    if on_cuda and config.optimizer in FUSED and not {"fused", "foreach"} & config.optimizer_args.keys():
        offered["fused"] = True  # one kernel for all weights; on CPUs it would change last bits
    return make_optimizer(config.optimizer, groups, offered, config.optimizer_args)


def build_schedule(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step, from 0. Raises RecipeError if it cannot be built.

    It is a linear warm-up, then the schedule; timm's have their own warm-up.
    """
    settings = {key: getattr(config, key) for key in ("lr", "min_lr", "epochs", "warmup_epochs", "milestones", "gamma")}
    return make_schedule(config.schedule, settings, config.schedule_args, steps_per_epoch)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step`, from 0."""
    return build_schedule(config, steps_per_epoch)(step)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups, each with its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _offered(config: TrainConfig) -> dict[str, Any]:
    """Return what an optimizer gets if it names it; what is left to the optimizer's own default is absent."""
    offered = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    more = {"betas": config.betas} if config.betas else {}
    return {**offered, **more, **({"nesterov": True} if config.nesterov and config.momentum > 0 else {})}


def _is_timm(name: str) -> bool:
    return name.startswith(PREFIX)


def check_training(config: TrainConfig, where: str, *, imports: bool) -> None:
    """Raise RecipeError if the optimizer or the schedule does not exist, or has no such argument.

    Args:
        config: The training.
        where: Its key in the recipe, for messages.
        imports: Whether to import what `python:` and `timm:` name, and to try everything with one weight.
    """
    try:
        if imports:
            if not is_common(config):
                weight = nn.Parameter(torch.zeros(2, 2))
                make_optimizer(config.optimizer, [weight], _offered(config), config.optimizer_args)
            for step in {0, max(0, 10 * config.epochs - 1)}:
                learning_rate(config, step, 10)
            return
        if not config.optimizer.startswith(IMPORTED):
            optimizer_keywords(config.optimizer, _offered(config), config.optimizer_args)
        if not config.schedule.startswith(IMPORTED):
            build_schedule(config, 10)
    except RecipeError as error:
        raise RecipeError(str(error).replace("train.", f"{where}.", 1)) from error


def is_common(config: TrainConfig) -> bool:
    """Return whether a training has a built-in optimizer and schedule, and only keys that none of them refuses.

    Making an optimizer imports torch's compiler, which takes a second.
    """
    built_in = config.optimizer in OPTIMIZERS.builtin and config.schedule in SCHEDULES.builtin
    return built_in and _chosen(config) <= NEVER_REFUSED


def _chosen(config: TrainConfig) -> set[str]:
    """Return the keys that are not at their defaults."""
    defaults = TrainConfig()
    return {key for key in vars(defaults) if getattr(config, key) != getattr(defaults, key)}


def idle_keys(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield each key that was chosen but has no effect, with the reason."""
    chosen = _chosen(config)
    optimizer = named_keywords(find_optimizer(config.optimizer))
    schedule: set[str] = {"min_lr"} | ({"milestones"} if config.schedule == "timm:multistep" else set())
    if not _is_timm(config.schedule):
        schedule = set(named_keywords(SCHEDULES.get(config.schedule)))
    for key in sorted(chosen & {"momentum", "nesterov", "betas", "weight_decay"} - set(optimizer)):
        yield key, f"optimizer = {config.optimizer!r}"
    for key in sorted(chosen & {"milestones", "gamma", "min_lr"} - schedule):
        yield key, f"schedule = {config.schedule!r}"
    if "clip_grad_mode" in chosen and config.clip_grad is None:
        yield "clip_grad_mode", "no clip_grad"
