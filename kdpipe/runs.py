"""Run folders of the Python API: the same files as those of the command line, with lock, device and progress."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from kdpipe.pipeline.callbacks.registry import build_callbacks
from kdpipe.stages.compute.determinism import set_deterministic
from kdpipe.stages.compute.threads import threads_of_call
from kdpipe.stages.context import StageContext, require_fitting_test_images, test_image_size
from kdpipe.stages.data.decode import with_size
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.mix_partners import find_partners
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.runtime.callbacks import Callback
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup, init_distributed
from kdpipe.stages.runtime.events import WARNING, ProgressEvent, RunMonitor
from kdpipe.stages.runtime.gpu.device import choose_device, select_device, torch_device
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.training.job_dir import note_on_old_jobs, read_json_file, sweep_run
from kdpipe.stages.views.config import Views
from kdpipe.stages.workspace import VARIABLE, workspace_of
from kdpipe.store import FingerprintMismatch, canonical_json, differences, exclusive, make_folders, shared

LATER_KEYS = {
    "classes": None,
    "weights_key": None,
    "fresh_head": False,
    "class_weights": None,
    "sampler": "shuffle",
    "rest": "equal",
    "view": None,
    "target_view": None,
    "target": "teacher",
}
"""Keys of a student's model, training and losses that older recipes of runs lack, with their defaults."""

CallbackLike = Callback | str | dict[str, Any]

RUNS = Path("runs")
"""The folder of runs that are given no folder of their own."""


@dataclass(frozen=True)
class RunOptions:
    """How a stage works: the arguments that all functions of the API share.

    Attributes:
        run: The run folder; by default one in `runs/`, named after a digest of all inputs.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: objects, names or tables as in a recipe.
    """

    run: str | Path | None = None
    device: str | torch.device = "auto"
    num_workers: int | None = None
    progress: bool = True
    callbacks: Sequence[CallbackLike] = ()

    def folder(self, kind: str, fingerprint: Mapping[str, Any]) -> Path:
        """Return the run folder, absolute; the default is `runs/KIND-DIGEST` with the digest of the fingerprint."""
        if self.run is not None:
            return Path(self.run).expanduser().absolute()
        digest = hashlib.sha256(canonical_json(fingerprint).encode()).hexdigest()[:12]
        return (RUNS / f"{kind}-{digest}").absolute()

    def context(
        self,
        train_set: ImageSet,
        test_set: ImageSet | None,
        views: Views,
        *,
        store: Path | None = None,
        validation_set: ImageSet | None = None,
    ) -> StageContext:
        """Return the context of a stage, without its run folder.

        Args:
            train_set: The training images.
            test_set: The test images; None for a stage that needs none.
            views: The views of the training images.
            store: The store whose samples MixUp and CutMix take their partners from; by default the training images.
            validation_set: The images that decide in place of the test images.

        Raises:
            RecipeError: The views cannot be applied to the images.
            DataError: The test images do not fit the training images.
        """
        partners = None
        if views.mix is not None and store is not None:
            partners = find_partners(store, train_set)
        context = StageContext(
            Path(),
            train_set,
            train_set,
            views,
            _device(self.device),
            RunMonitor(_warn),
            mix_partners=partners,
            num_workers=self.num_workers,
        )
        if test_set is None:
            return context
        size = test_image_size(context)
        validation_set = None if validation_set is None else _resized(validation_set, size)
        context = replace(context, test_set=_resized(test_set, size), validation_set=validation_set)
        require_fitting_test_images(context)
        return context

    @contextmanager
    def open(self, folder: Path, context: StageContext, *, is_shared: bool = False) -> Iterator[StageContext]:
        """Create and lock the run folder; yield the context with folder, progress and processes.

        Raises:
            LockedError: Another process works in the folder.
        """
        from kdpipe.pipeline.terminal.progress import reporter

        disable_malloc_trim()
        lock = shared if is_shared else exclusive
        with ExitStack() as stack:
            stack.callback(set_deterministic(context.device))
            stack.enter_context(threads_of_call())
            process_group = stack.enter_context(_process_group())
            if process_group.is_main:
                make_folders([folder])
                stack.enter_context(lock(folder, folder / ".kdpipe.lock"))
                if not is_shared:
                    sweep_run(folder)
                if note := note_on_old_jobs(folder):
                    warnings.warn(note, stacklevel=4)
            report = stack.enter_context(reporter(as_json=False)) if self.progress and process_group.is_main else None

            def show(event: ProgressEvent) -> None:
                if event.unit == WARNING:
                    _warn(event)
                elif report is not None:
                    report(event)

            should_stop = stack.enter_context(_interrupts())
            monitor = RunMonitor(show, should_stop, _built(self.callbacks), run_dir=folder)
            workspace = workspace_of(folder, os.environ.get(VARIABLE))
            yield replace(context, run_dir=folder, monitor=monitor, process_group=process_group, workspace=workspace)


def require_same_student(folder: Path, sections: Mapping[str, Any]) -> None:
    """Raise FingerprintMismatch if a run folder has a student with other settings than these, but for its seed.

    Reports average the students of a folder.
    """
    stored = read_json_file(folder / "recipe.json") or {}

    def without_later(section: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in section.items() if key not in LATER_KEYS or value != LATER_KEYS[key]}

    def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
        student = recipe.get("student") or {}
        train = {key: value for key, value in student.get("train", {}).items() if key != "checkpoint_every_s"}
        model = without_later(student.get("model") or {})
        own = {"model": model, "train": without_later(train), "image_size": student.get("image_size")}
        return {"student": own, "distill": [without_later(loss) for loss in recipe.get("distill") or ()]}

    before, wanted = settings(stored), settings(json.loads(json.dumps(sections)))
    if not (before["distill"] and wanted["distill"]):  # one of them was trained alone
        before["distill"] = wanted["distill"] = None
    if stored and (found := differences(before, wanted)):
        advice = "The students of a run differ in their seeds only: choose another run=."
        raise FingerprintMismatch(f"the student in {folder}", found, advice)


def write_run_recipe(folder: Path, sections: Mapping[str, Any]) -> None:
    """Write the recipe of a run folder, which `kdpipe report` reads; the command line's own one stays.

    Sections of earlier calls on the same folder are kept, and so are the seeds of a student trained with others.
    """
    from kdpipe.pipeline.recipe import load
    from kdpipe.pipeline.report.networks import MADE_IN_PYTHON

    path, mark = folder / "recipe.json", folder / MADE_IN_PYTHON
    stored = read_json_file(path) or {}
    if stored and not mark.exists():
        return
    mark.touch()
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name).lstrip("_.-") or "run"
    table = {"name": name, **stored, **sections}
    if "student" in sections and "student" in stored:
        seeds = {*stored["student"]["seeds"], *sections["student"]["seeds"]}
        table["student"] = {**sections["student"], "seeds": sorted(seeds)}
        if not sections["distill"]:  # a student alone has no losses and stores
            table |= {key: stored[key] for key in ("teacher", "distill")}
            table["student"] = {**stored["student"], "seeds": sorted(seeds)}
    load.write_run_recipe(folder, load.recipe_json(load.parse_recipe(table, str(path))))


P = ParamSpec("P")
R = TypeVar("R")


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function apart from torch's ambient state: autocast, grad mode, generators; they stay as they were.

    Raises RecipeError if torch's default dtype is not float32, or its default device not the CPU.
    """

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        if torch.get_default_dtype() != torch.float32:
            raise RecipeError(
                f"torch's default dtype is {torch.get_default_dtype()}, and kdpipe computes in float32: call "
                "torch.set_default_dtype(torch.float32) first."
            )
        if torch.get_default_device().type != "cpu":
            raise RecipeError(
                f"torch's default device is {torch.get_default_device()}, and kdpipe builds on the CPU: call "
                "torch.set_default_device(None) first, and choose the device by device=."
            )
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.random.fork_rng(devices),
        ):
            return function(*arguments, **keywords)

    return call


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a flag that Ctrl-C and the signals of batch systems set: work is saved first, a second Ctrl-C aborts.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: After another signal, with status 75 as on the command line.
    """
    from kdpipe.pipeline.session.signals import handle_signals
    from kdpipe.pipeline.terminal.exit_codes import STOPPED_EARLY

    try:
        with handle_signals() as should_stop:
            yield should_stop
    except StoppedEarly as error:
        message = f"stopped early {error}; all finished work is saved: the same call continues."
        if "SIGINT" in str(error):
            raise KeyboardInterrupt(message) from None
        warnings.warn(message, stacklevel=2)
        raise SystemExit(STOPPED_EARLY) from None


def _resized(image_set: ImageSet, size: int | None) -> ImageSet:
    """Return the images in the size of the views, if they are in memory; files are resized when they are read."""
    if size is None or not isinstance(image_set.images, torch.Tensor):
        return image_set
    pixels = with_size(image_set.images.numpy(), size, f"data set {image_set.name}")
    return replace(image_set, images=torch.from_numpy(pixels))


def _built(callbacks: Sequence[CallbackLike]) -> tuple[Callback, ...]:
    """Return callbacks as objects; each name or table builds one."""
    return tuple(one if isinstance(one, Callback) else build_callbacks([one])[0] for one in callbacks)


def _device(name: str | torch.device) -> torch.device:
    if isinstance(name, torch.device):
        return torch_device(name)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # too late to choose among the machine's GPUs
        return choose_device(name)
    return select_device(name, warn=lambda text: warnings.warn(text, stacklevel=3))


def _warn(event: ProgressEvent) -> None:
    if event.unit == WARNING:
        warnings.warn(event.job, stacklevel=2)


@contextmanager
def _process_group() -> Iterator[ProcessGroup]:
    """Yield the processes that torchrun or srun started; those of a group that the caller made are used as they are."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with init_distributed(os.environ, lambda: False) as process_group:
            yield process_group
    else:
        yield SINGLE
