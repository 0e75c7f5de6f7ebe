"""The trial before a long run: which precision, memory format and batch size are fastest, and how exact they are.

Each way to compute the teacher is timed on the store's first images. The fastest whose logits are as good as those in
float32 (`cache.max_kl`) is recorded in the new store, with its errors and its batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.cache_teacher.choice import DEFAULT_BATCH_SIZE, require_available, settings_of, with_settings
from kdpipe.stages.cache_teacher.fidelity import compare
from kdpipe.stages.cache_teacher.inference import forward, hooked_layers, needs_labels
from kdpipe.stages.cache_teacher.plan import CacheConfig, samples_in_row_order, stored_layers
from kdpipe.stages.compute.settings import EXACT, ComputeSettings, fast_precisions
from kdpipe.stages.compute.threads import fastest_count, max_threads, open_counts, threads
from kdpipe.stages.compute.trial import WORTH_A_TRIAL, choose, is_worth_a_trial, time_in_turn, time_on_one_thread
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.data.loader.labels import HardLabels, hard_labels_of
from kdpipe.stages.errors import RecipeError, StoppedEarly, cause
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import FeatureExtractor, ModelOutput, capture, extract_features
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.runtime.memory import available_bytes, free_gpu_bytes, is_out_of_memory, limit_bytes
from kdpipe.stages.targets.feature_spec import INPUT_GRADIENT, FeatureSpec
from kdpipe.store import Manifest, read_store_manifest
from kdpipe.store.format.identity import describe_computation

MAX_FEATURE_ERROR = 2e-2
"""The relative error (root mean square) of stored features up to which "auto" takes a precision."""

MIN_BATCH_GAIN = 1.05
"""A batch is doubled while that makes the teacher this many times as fast."""

BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)

MAX_TIMED = {"cpu": 64, "cuda": 256}
"""Images of which each candidate is timed, at most."""

MEMORY_SHARE = 0.25
"""The share of the memory that is free which a batch's activations may take."""


def decide(
    planned: Manifest,
    config: CacheConfig,
    teacher: ModelBundle,
    layers: Sequence[FeatureSpec],
    context: StageContext,
    *,
    like: Path | None = None,
) -> Manifest:
    """Return the manifest of a new store, with the way in which its teacher is to be computed.

    That of the store `like`, if there is one; else what the recipe says, and for a large job, where it says "auto",
    what a trial finds. Raises RecipeError for a precision of the recipe that is not faithful, ModelError for one that
    the device lacks.
    """
    if like is not None:
        own = read_store_manifest(like)
        return with_settings(planned, settings_of(own), own.trial)
    require_available(config.precision, context.device)
    layers = stored_layers(config, teacher, layers)
    settings, num_images = config.settings, planned.layout.num_views * planned.layout.num_samples
    is_large = _is_large(teacher.model, context, num_images)
    if not is_large and settings.precision == "float32":
        return with_settings(planned, settings, {})
    with ExitStack() as hooks:
        trial = Trial(config, teacher, layers, context, num_images, hooks)
        found, record = trial.faithful(trial.candidates if is_large else [replace(settings, compile=False)])
        num_threads = 1
        if is_large and context.device.type == "cpu" and max_threads() > 1:
            num_threads = record["threads"] = trial.num_threads(found)
        if is_large and config.batch_size == "auto":
            record["batch_size"] = trial.batch_size(found, planned.layout.unit_rows, num_threads)
    decided = with_settings(planned, replace(found, compile=config.compile), {"device": context.device.type, **record})
    inexact = {name: error for name, error in record.get("features", {}).items() if error > MAX_FEATURE_ERROR}
    for name, error in inexact.items():
        context.monitor.warn("cache-teacher", f"in {found} the relative error of {name} is {error:.2g}.")
    text = f"the teacher: {describe_computation(decided.identity.compute, decided.trial)}"
    context.monitor.report(ProgressEvent("cache-teacher", text, 1, 1, "trial"))
    return decided


def _is_large(model: nn.Module, context: StageContext, num_images: int) -> bool:
    """Return whether so many images are worth a trial."""
    _, height, width = context.image_shape
    bound = num_images * height * width * sum(parameter.numel() for parameter in model.parameters())
    if bound < WORTH_A_TRIAL.get(context.device.type, float("inf")):  # a weight is used at most once for each pixel
        return False
    return is_worth_a_trial(float(num_images * count_macs(model, context.image_shape)), context.device)


@dataclass(frozen=True)
class Trial:
    """The teacher on the first images of a store.

    Attributes:
        layers: The features that are stored.
        num_images: Images of the whole job, of which the trial takes a small part.
        hooks: Keeps the teacher's hooks until the trial is over.
    """

    config: CacheConfig
    teacher: ModelBundle
    layers: Sequence[FeatureSpec]
    context: StageContext
    num_images: int
    hooks: ExitStack

    @property
    def candidates(self) -> list[ComputeSettings]:
        """All that the recipe leaves open, the most exact first."""
        precision, memory_format = self.config.precision, self.config.memory_format
        # The gradients of single pixels fall below float16's range.
        barred = {"float16"} if any(feature.source == INPUT_GRADIENT for feature in self.layers) else set[str]()
        fast = [one for one in fast_precisions(self.context.device) if one not in barred]
        has_norms = any(isinstance(module, nn.BatchNorm2d) for module in self.teacher.model.modules())
        may_fold = has_norms and not self.config.compile and not needs_labels(self.layers)
        return [
            ComputeSettings(one, other, folded=may_fold and other == "channels_last")
            for one in (("float32", *fast) if precision == "auto" else (precision,))
            for other in (("contiguous", "channels_last") if memory_format == "auto" else (memory_format,))
        ]

    def faithful(self, candidates: Sequence[ComputeSettings]) -> tuple[ComputeSettings, dict[str, Any]]:
        """Return the fastest of the candidates whose outputs are those in float32, and the record of its errors.

        Fewer images at once are tried where they do not fit into memory. Raises RecipeError where the recipe leaves no
        other candidate.
        """
        size = max(4, min(MAX_TIMED[self.context.device.type], self.num_images // 800))
        while True:
            try:
                return self._faithful(candidates, size)
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            size //= 2

    def _faithful(self, candidates: Sequence[ComputeSettings], size: int) -> tuple[ComputeSettings, dict[str, Any]]:
        dropped = self._failures(candidates)
        rows = self._rows(0, size)
        runs = {one: partial(self._run, one, rows) for one in candidates if one not in dropped}
        seconds = time_on_one_thread(runs, self.context.device) if len(runs) > 1 else dict.fromkeys(runs, 0.0)
        while seconds:
            chosen, record = choose(seconds), {"dropped": {str(one): why for one, why in dropped.items()}}
            if chosen == EXACT:
                return chosen, record if dropped else {}
            temperatures = () if self.teacher.is_headless else self.config.temperatures
            errors = compare(self._pairs(chosen, size), self.layers, temperatures, self.context.train_set.task)
            fault = self._fault(errors)
            if errors is not None and fault is None:
                return chosen, {**errors, **(record if dropped else {})}
            del seconds[chosen]
            dropped[chosen] = str(fault)
        name, fault = next(iter(dropped.items()))
        raise RecipeError(
            f"the teacher cannot be computed in {name}: {fault}. Set cache.precision and cache.memory_format to "
            f"'auto'{', or raise cache.max_kl' if 'max_kl' in fault else ''}."
        )

    def batch_size(self, settings: ComputeSettings, unit_rows: int, num_threads: int) -> int:
        """Return the smallest batch that is about as fast as any: doubling it gains too little, or does not fit."""
        time_runs = time_on_one_thread if num_threads == 1 else time_in_turn
        fitting = max(1, self._free_bytes() // self._image_bytes())
        sizes = [size for size in BATCH_SIZES if size <= min(max(32, self.num_images // 600), fitting, unit_rows)]
        best = sizes[0] if sizes else min(DEFAULT_BATCH_SIZE, fitting)
        for size in sizes[1:]:
            runs = {one: partial(self._run, settings, self._rows(0, one)) for one in (best, size)}
            try:
                with threads(num_threads):
                    seconds = time_runs(runs, self.context.device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            if best * seconds[size] * MIN_BATCH_GAIN > size * seconds[best]:
                break
            best = size
        return best

    def num_threads(self, settings: ComputeSettings) -> int:
        """Return the number of CPU threads for networks whose last bits depend on it."""
        rows = self._rows(0, MAX_TIMED["cpu"])
        return fastest_count(open_counts(), partial(self._run, settings, rows))

    def _failures(self, candidates: Sequence[ComputeSettings]) -> dict[ComputeSettings, str]:
        """Return why some candidates do not run at all; raises what float32 raises."""
        failures: dict[ComputeSettings, str] = {}
        for settings in candidates:
            try:
                self._run(settings, self._rows(0, 1))
            except StoppedEarly:
                raise
            except Exception as error:
                if settings == EXACT:
                    raise
                failures[settings] = cause(error)
        return failures

    def _fault(self, errors: Mapping[str, Any] | None) -> str | None:
        """Return why outputs with such errors are not as good as those in float32; None if they are."""
        if errors is None:
            return "its outputs are not finite"
        temperature, kl = max(errors["kl"].items(), key=lambda pair: float(pair[1]), default=("", 0.0))
        if kl > self.config.max_kl:
            return (
                f"its KL divergence from float32 is {kl:.2g} nats at T = {temperature} ({errors['top1_flips']} of "
                f"{errors['num_images']} top-1 flips), and cache.max_kl is {self.config.max_kl:g}"
            )
        features = errors["features"]
        bad = [name for name in features if self.config.precision == "auto" and features[name] > MAX_FEATURE_ERROR]
        return f"the relative error of {bad[0]} is {features[bad[0]]:.2g}" if bad else None

    @cached_property
    def _first(self) -> tuple[Tensor, HardLabels]:
        """The store's first images, in the first view, and their labels."""
        count, loader = max(16, min(256, self.num_images // 50)), self.context.train_loader
        ids = samples_in_row_order(self.context).ids[:count]
        batch = loader.get(ViewRequest(torch.from_numpy(self.context.samples.positions_of(ids)), 0))
        return batch.images, hard_labels_of(loader, batch)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, HardLabels]:
        """Return images and labels; the first ones again where there are too few."""
        images, hard = self._first
        index = torch.arange(start, stop, device=images.device) % len(images)
        return images[index], hard.rows(index)

    @cached_property
    def _networks(self) -> dict[str, tuple[ModelBundle, FeatureExtractor]]:
        """The teacher and its hooks by memory format: one network each, as a timed run must not convert weights."""
        networks: dict[str, tuple[ModelBundle, FeatureExtractor]] = {}
        for memory_format in ("contiguous", "channels_last"):
            settings = ComputeSettings("float32", memory_format)
            model = self.teacher.model if settings == EXACT else clone_without_hooks(self.teacher.model)
            settings.place(model)
            extractor = self.hooks.enter_context(extract_features(model, hooked_layers(self.layers)))
            networks[memory_format] = replace(self.teacher, model=model), extractor
        return networks

    @torch.no_grad()
    def _run(self, settings: ComputeSettings, rows: tuple[Tensor, HardLabels]) -> ModelOutput:
        self.context.monitor.check()
        bundle, extractor = self._networks[settings.memory_format]
        labels = rows[1] if needs_labels(self.layers) else None
        return forward(extractor, replace(bundle, compute=settings), rows[0], labels)

    def _pairs(self, settings: ComputeSettings, size: int) -> Iterator[tuple[ModelOutput, ModelOutput]]:
        """Yield the outputs in float32 and in `settings`, batch by batch."""
        count = len(self._first[0])
        for start in range(0, count, size):
            rows = self._rows(start, min(start + size, count))
            yield self._run(EXACT, rows), self._run(settings, rows)

    @torch.no_grad()
    def _image_bytes(self) -> int:
        """Return about the memory of an image's pass: its largest activation, read, written and kept by a shortcut."""
        model, images = self.teacher.model, self.teacher.normalize(self._rows(0, 1)[0])
        leaves = [module for module in model.modules() if not any(True for _ in module.children())]
        with capture(leaves, _num_elements) as found:
            model(images)
        largest: int = max([images.numel(), *(count for counts in found.values() for count in counts)])
        return 16 * largest

    def _free_bytes(self) -> int:
        """Return the memory that a batch may take."""
        device = self.context.device
        free = free_gpu_bytes(device) if device.type == "cuda" else min(available_bytes(), limit_bytes() or math.inf)
        return int(MEMORY_SHARE * free)


def _num_elements(output: object) -> int:
    return output.numel() if isinstance(output, Tensor) else 0
