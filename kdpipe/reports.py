"""Evaluate networks, verify stores, and read the results of run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe.datasets import as_image_set
from kdpipe.models import info_of
from kdpipe.pipeline.report.report import read_report
from kdpipe.pipeline.report.rows import Report
from kdpipe.runs import RunOptions, isolated
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.metrics import EvalReport, evaluate_in_depth
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.views.config import Views
from kdpipe.store import TargetStore
from kdpipe.store.check.verify import VerifyReport, verify_store


@isolated
def evaluate(
    model: nn.Module | ModelBundle,
    dataset: Any,
    *,
    normalize: Normalization | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
) -> EvalReport:
    """Evaluate a network on images without augmentation.

    Args:
        model: The network, or what `load_student` returns.
        dataset: The images, as everywhere.
        normalize: The input scaling, such as `loader.normalize` of a `DistillationLoader`; that of its training for a
            network that kdpipe trained or loaded.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.

    Returns:
        `top1`, `top5`, `cross_entropy`, calibration error `ece`, accuracy of each class and confusions.

    Raises:
        ModelError: The scaling is unknown, or the network does not fit the images.
    """
    test_set = as_image_set(dataset, "test")
    network: nn.Module = model.model if isinstance(model, ModelBundle) else model
    known = model.normalize if isinstance(model, ModelBundle) else info_of(model).normalize
    scaling = normalize or known
    if scaling is None:
        raise ModelError(
            f"the input scaling of this {type(network).__name__} is unknown: give normalize=, such as loader.normalize."
        )
    context = RunOptions(device=device, num_workers=num_workers).context(test_set, None, Views(num_views=1))
    return evaluate_in_depth(network.to(context.device), context.evaluation(scaling), context.device)


def report(run: str | Path, *, html: str | Path | None = None) -> Report:
    """Read the results of a run folder, and write them as an HTML page if asked to.

    Args:
        run: The run folder, of the command line or of `train_student`.
        html: Where to write the page, one file without scripts.

    Returns:
        The rows of the tables: accuracy, size, latency and agreement of each network.

    Raises:
        RunError: It is not a run folder, or its results are damaged.
    """
    folder = Path(run).expanduser()
    found = read_report(folder)
    if html is not None:
        from kdpipe.pipeline.report.html.write import write_page

        write_page([folder], Path(html).expanduser(), lambda message: None)
    return found


def verify(store: TargetStore | str | Path) -> VerifyReport:
    """Verify every byte of a store: metadata, samples, markers and shards.

    Args:
        store: An opened store, or its folder.

    Returns:
        All faults in `damaged`, unfinished units in `missing`; `ok` if there are none.

    Raises:
        StoreError: There is no store.
    """
    return verify_store(store.path if isinstance(store, TargetStore) else Path(store).expanduser())
