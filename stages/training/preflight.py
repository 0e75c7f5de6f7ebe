"""Run an untrained network as its training, its evaluation and its export will, to raise their errors before them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdpipe.stages.compute.compiled import require_traceable
from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.export.trial import try_export
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS
from kdpipe.stages.runtime.memory import is_out_of_memory
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import time_steps
from kdpipe.stages.training.optim import TrainConfig, is_common
from kdpipe.stages.training.set_up import COMPILE
from kdpipe.stages.training.task import TrainingTask
from kdpipe.store import KdpipeError
from kdpipe.store.format.identity import sha256_of

NUM_IMAGES = 3

_passed: set[str] = set()
"""What this process has tried with success: the networks of several seeds and stages are tried once."""


def try_network(
    network: ModelBundle, config: TrainConfig | None, *, role: str, device: torch.device, exports: bool = False
) -> None:
    """Run a copy of an untrained network in all the ways that its job will; the network stays unchanged.

    It is evaluated on batches of one, two and three random images, trained for a step on each of the sizes that its
    training may have, and exported.

    Args:
        network: The network.
        config: Its training; None if it is not trained.
        role: What it is called in messages, "student" or "teacher".
        device: The device to run on.
        exports: Whether it must be possible to export it to ONNX.

    Raises:
        ModelError: The network does not run on such a batch, or cannot be exported.
        RecipeError: It cannot be trained with these settings.
    """
    trains = config is not None and config.epochs > 0
    digest = sha256_of(
        {
            "architecture": dict(network.architecture),
            "train": dict(config_fingerprint(config)) if config and trains else None,
            "exports": exports,
            "device": device.type,
        }
    )
    if digest in _passed:
        return
    try_batches(network, config, role=role, device=device)
    if exports:
        _require_export(network.model, _image_shape(network.architecture))
    _passed.add(digest)


def try_batches(network: ModelBundle, config: TrainConfig | None, *, role: str, device: torch.device) -> None:
    """Evaluate a copy of a network on batches of one, two and three, and train it for a step on batches of each kind.

    Raises:
        ModelError, RecipeError: As `try_network`.
    """
    image_shape = _image_shape(network.architecture)
    model = clone_without_hooks(network.model)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        for size in (3, 2, 1):
            images = torch.rand(size, *image_shape, generator=torch.Generator().manual_seed(size))
            try_batch(model.to(device), images.to(device), network.architecture["num_classes"], role=role)
        if config is not None and config.epochs > 0:
            _try_training(replace(network, model=model), config, image_shape, role=role, device=device)


def try_batch(model: nn.Module, images: Tensor, num_classes: int, *, role: str) -> None:
    """Evaluate a network on images [B, C, H, W]. Raises ModelError if it does not give logits for each of them."""
    size = len(images)
    batch = f"a batch of {size}" if size > 1 else "a batch of one image"
    with torch.no_grad(), _explained(model, f"the {role} does not run on {batch}", _advice(size)):
        logits = model.eval()(images)
    if list(logits.shape) != [size, num_classes or logits.shape[-1]]:  # embeddings have any width
        raise ModelError(
            f"the {role} makes {list(logits.shape)} of {batch}, wanted logits [{size}, {num_classes}]. {_advice(size)}"
        )


def _advice(size: int) -> str:
    if size > 1:
        return "Its forward must take any number of images."
    return (
        "A test set or a user may end with one image: where the forward has squeeze(), which removes the batch axis "
        "too, write flatten(1), or name the axes: squeeze((2, 3))."
    )


def _try_training(
    network: ModelBundle, config: TrainConfig, image_shape: tuple[int, int, int], *, role: str, device: torch.device
) -> None:
    """Train the network for a step on batches of each kind of size: even, odd, and one if that is configured."""
    num_classes = network.architecture["num_classes"] or 2  # any labels of embeddings
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (NUM_IMAGES, *image_shape), dtype=torch.uint8, generator=generator)
    ids = torch.arange(NUM_IMAGES)
    classes = tuple(map(str, range(num_classes)))
    loader = ImageLoader(ImageSet("preflight", "train", images, ids % num_classes, ids, classes), device)
    for size in (2, 3) if config.batch_size > 1 else (1,):
        job = TrainJob(
            stage="preflight",
            name=role,
            model=network.model,
            task=TrainingTask(loader, 1, network.normalize),
            test=None,
            # The weights of the classes are for the labels of the training set.
            config=replace(config, epochs=1, batch_size=size, class_weights=None, sampler="shuffle"),
            seed=0,
            job_dir=JobDir(Path()),
        )
        advice = "Change its forward." if size > 1 else "Raise batch_size, or change its forward."
        with _explained(network.model, f"the {role} cannot be trained on a batch of {size}", advice):
            if network.architecture.get("model") in SMALL_IMAGE_NETWORKS and is_common(config):  # the step cannot fail
                logits = network.model.train()(network.normalize(images[:size].to(device)))
                loss = cross_entropy(logits, ids[:size].to(device) % num_classes)
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                time_steps(job, device, 1)
    if config.compile:
        require_traceable(network.model.train(), network.normalize(images.to(device)), COMPILE)


def _require_export(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    try:
        try_export(model, image_shape)
    except ModelError as error:
        raise ModelError(
            f"{str(error).removesuffix('.')}. Change that part of the student, or set student.export = false to train "
            "it without an ONNX file, and then without `kdpipe compress`."
        ) from error


@contextmanager
def _explained(model: nn.Module, what: str, advice: str) -> Iterator[None]:
    """Convert a network's own errors to a ModelError that says where in its source they arose."""
    try:
        yield
    except KdpipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what} ({cause(error)}){_place(error, model)}. {advice}") from error


def _place(error: Exception, model: nn.Module) -> str:
    """Return a clause that names the module, not torch's own, in whose forward the error arose; "" if there is none."""
    paths = {module: path for path, module in model.named_modules()}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in paths and not type(module).__module__.startswith("torch."):
            file = Path(frame.f_code.co_filename).name
            name = f"{type(module).__name__} {paths[module]!r}" if paths[module] else type(module).__name__
            return f", in line {line} of {file}, in the forward of {name}"
    return ""


def _image_shape(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = architecture["image_size"]
    return architecture["in_channels"], height, width
