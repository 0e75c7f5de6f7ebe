"""Evaluate networks, verify stores, and read the results of run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from kdpipe.arguments import Scaling, as_file, as_path, as_run_options
from kdpipe.datasets import as_image_set
from kdpipe.models import info_of, network_of
from kdpipe.pipeline.commands.verify import RunVerifyReport, verify_run
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report
from kdpipe.results import CompressedResult, Result, StudentResult
from kdpipe.runs import isolated
from kdpipe.stages.distillation.stored_embeddings import embeddings_in
from kdpipe.stages.errors import ModelError, RunError
from kdpipe.stages.evaluation.embeddings import examine
from kdpipe.stages.evaluation.metrics import EvalReport, evaluate_in_depth
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import evaluated_on
from kdpipe.stages.models.normalization import as_normalization
from kdpipe.stages.targets.open import open_store_anywhere, test_store_path
from kdpipe.stages.views.config import Views
from kdpipe.store import TargetStore
from kdpipe.store.check.verify import VerifyReport, verify_store
from kdpipe.store.fs.checksums import SUMS


@isolated
def evaluate(
    model: nn.Module | ModelBundle | Result | CompressedResult,
    dataset: Any,
    *,
    normalize: Scaling | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
) -> EvalReport:
    """Evaluate a network on images without augmentation.

    Args:
        model: The network, what `load_student` returns, or a result.
        dataset: The images, as everywhere.
        normalize: The input scaling: `loader.normalize` of a `DistillationLoader`, or (mean, std), each a number or one
            for each channel, for pixels in [0, 1]; that of its training if kdpipe trained or loaded it.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.

    Returns:
        `top1`, `top5`, `cross_entropy`, calibration error `ece`, accuracy of each class and confusions.

    Raises:
        ModelError: The scaling is unknown, or the network does not fit the images.
    """
    found = network_of(model, "the network to evaluate")
    test_set, run_options = as_image_set(dataset, "test"), as_run_options(None, device, num_workers)
    network, known = (
        (found.model, found.normalize) if isinstance(found, ModelBundle) else (found, info_of(found).normalize)
    )
    scaling = known if normalize is None else as_normalization(normalize, test_set.in_channels)
    if scaling is None:
        raise ModelError(
            f"the input scaling of this {type(network).__name__} is unknown: give normalize=, such as loader.normalize."
        )
    context = run_options.context(test_set, None, Views(num_views=1))
    if (size := info_of(network).resized_from.get(test_set.image_size)) is not None:
        context = context.resized(size)  # as in its training
    with evaluated_on(network, context.device):
        return evaluate_in_depth(network, context.evaluation(scaling), context.device)


@isolated
def evaluate_embeddings(
    store: TargetStore | str | Path, test: TargetStore | str | Path | None = None
) -> dict[str, Any]:
    """Judge the embeddings in a store by k-NN and a linear probe, without the teacher.

    Both are fitted to the first view of the labeled training images, at most 50,000.

    Args:
        store: The store of the training images, with `features/pre_logits`: of a teacher without a classifier, or with
            features=["pre_logits"].
        test: That of the test images; by default the one beside it (`store.test.zarr`).

    Returns:
        `knn` and `linear_probe`, each with its `accuracy` on the test images and its settings.

    Raises:
        StoreError: A store is missing, or has no embeddings.

    Example:
        >>> import kdpipe as kd
        >>> train, test = kd.load_dataset("digits", test_share=0.5)
        >>> teacher, scaling = kd.create_model("cnn", train, output="embeddings"), {"mean": [0.3], "std": [0.4]}
        >>> options = {"test": test, "output": "embeddings", "progress": False}
        >>> store = kd.cache_teacher(teacher, train, "embeddings.zarr", **options, **scaling)
        >>> kd.evaluate_embeddings(store)["knn"]["accuracy"] > 0.8
        True
    """
    place = store.path if isinstance(store, TargetStore) else store
    opened = [
        one if isinstance(one, TargetStore) else open_store_anywhere(one)
        for one in (store, test_store_path(place) if test is None else test)
    ]
    fitted, tested = (embeddings_in(one) for one in opened)
    return examine(fitted, tested, 1 + int(max(fitted.labels.max(), tested.labels.max()))).to_json()


def report(run: str | Path | StudentResult | CompressedResult, *, html: str | Path | None = None) -> Report:
    """Read the results of a run folder, and write them as an HTML page if asked to.

    Args:
        run: The run folder, of the command line or of `train_student`; or a result of `train_student` or `compress`.
        html: Where to write the page, one file without scripts.

    Returns:
        The rows of the tables: accuracy, size, latency and agreement of each network.

    Raises:
        RunError: It is not a run folder, or its results are damaged.
    """
    if isinstance(run, Result) and not isinstance(run, StudentResult):
        raise RunError("a teacher has no report of its own: give the result of train_student, or a run folder.")
    own = run.folder.parent if isinstance(run, CompressedResult) else None
    folder = run.job.run if isinstance(run, StudentResult) else run.run if isinstance(run, CompressedResult) else None
    folder = as_path("run", run) if folder is None else folder  # type: ignore[arg-type]  # a result has a folder
    own = None if own == folder / "compressed" else own
    if html is not None and own is not None:
        raise RunError(f"a page shows what is in {folder / 'compressed'}, not {own}: call report without html=.")
    found = read_report(folder, own)
    if html is not None:
        from kdpipe.pipeline.report.html.write import write_page

        write_page([folder], as_file("html", html), lambda message: None)
    return found


@overload
def verify(place: TargetStore) -> VerifyReport: ...


@overload
def verify(place: Result | CompressedResult) -> RunVerifyReport: ...


@overload
def verify(place: str | Path) -> VerifyReport | RunVerifyReport: ...


def verify(place: TargetStore | Result | CompressedResult | str | Path) -> VerifyReport | RunVerifyReport:
    """Verify every byte of a store or of a run folder, by the checksums recorded when it was written.

    Args:
        place: A run folder, or a result, whose folder is checked; or a store, opened or its folder.

    Returns:
        All faults in `damaged`; of a store also unfinished units in `missing`, of a run the verdicts on its `stores`.
        `ok` if there are none.

    Raises:
        StoreError, RunError: There is no store, and no run folder.
        LockedError: A job is writing into the run folder.
    """
    if isinstance(place, TargetStore):
        return verify_store(place.path)
    path = place.folder if isinstance(place, Result | CompressedResult) else as_path("place", place)
    is_run = (path / SUMS).exists() or (path / "recipe.json").exists()
    return verify_run(path) if is_run else verify_store(path)
