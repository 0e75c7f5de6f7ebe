"""Write what every finished training job leaves: weights, ONNX file and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdpipe.stages.data.tasks import CLASSIFICATION, LOSS_NAMES, REGRESSION
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.evaluate import Evaluation, evaluate
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.evaluation.main_metric import deciding, main_value, metric_of
from kdpipe.stages.evaluation.metrics import EvalReport, evaluate_in_depth
from kdpipe.stages.export.onnx_check import OnnxAgreement, check_onnx
from kdpipe.stages.export.onnx_debug import first_divergence
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.runtimes import library_of
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.models.weights.state_dict import count_parameters
from kdpipe.stages.numerics import LOG_PROBABILITIES, PROBABILITIES
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.saved_model import save_model
from kdpipe.store import canonical_json
from kdpipe.store.fs.checksums import remove_with_sum

CHECKED_IMAGES = 1000
"""Test images on which an exported file is compared with torch."""


MIN_AGREEMENT = 0.99
"""The lowest top-1 agreement with torch on many images with which an ONNX file is accepted."""


FEW_IMAGES, MAX_FEW_SHARE = 2, 0.05
"""So many images may always differ, if they are no larger share of the test set: one of 90 is no evidence for 1 %."""


ROUNDING = 1e-9


MAX_ACCURACY_GAP = 0.001
"""The largest difference of accuracy from torch's, or two images if that is more, with which it is accepted."""


DEBUG_IMAGES = 32
"""Images on which the first divergence from torch is located."""


def finalize(
    job_dir: JobDir,
    network: ModelBundle,
    history: Sequence[Mapping[str, Any]],
    test: Evaluation,
    *,
    process_group: ProcessGroup = SINGLE,
    with_onnx: bool = True,
    on_no_export: Callable[[str], None] | None = None,
    more: Mapping[str, Any] | None = None,
    require: Callable[[EvalReport], None] = lambda report: None,
    validation: Evaluation | None = None,
) -> dict[str, Any]:
    """Evaluate a trained network, export it, and write its weights and results, which are returned.

    Of several processes the first does so, and all return its results.

    Args:
        job_dir: The folder that the files are written to.
        network: The trained network.
        history: The metrics of its epochs.
        test: The test images, with the teacher's logits if there are any.
        process_group: The processes that trained together.
        with_onnx: Whether to write an ONNX file.
        on_no_export: For a network that can do without this file: receives the reason why there is none.
        more: Further results.
        require: Called with the evaluation, before anything is written; may raise.
        validation: What its epochs were evaluated on, if these are not the test images.

    Warns if the accuracy is that of chance.

    Raises:
        ModelError: The export fails, or the file disagrees with the network on the first test images.
    """
    network.model.eval()

    def evaluate_and_write() -> dict[str, Any]:
        report = evaluate_in_depth(network.model, test, test.device)
        require(report)
        warn = test.warn or (lambda sentence: None)
        for warning in _warnings(report, test.loader.dataset.split):
            warn(f"the network in {job_dir.path} {warning}.")
        found = _validated(network, validation) | dict(more or {})
        return _write(
            job_dir, network, history, test, report, with_onnx=with_onnx, on_no_export=on_no_export, more=found
        )

    return process_group.on_main(evaluate_and_write)


def _validated(network: ModelBundle, validation: Evaluation | None) -> dict[str, Any]:
    """Return the main metric and the cross entropy on the validation images, and their number; nothing without any."""
    if validation is None:
        return {}
    found = evaluate(network.model, validation, validation.device).to_json()
    return {"validation": {**found, "num_images": validation.loader.dataset.num_samples}}


def _warnings(report: EvalReport, split: str) -> Iterator[str]:
    """Yield what makes a network useless as it is, or its outputs something else than logits."""
    if report.is_at_chance() and report.task == REGRESSION:
        yield (
            f"explains {report.top1:.2f} of the variance of {report.num_samples:,} {split} images: their mean is as "
            "good"
        )
    elif report.is_at_chance():
        yield (
            f"is not clearly above chance: {100 * report.top1:.2f} % of {report.num_samples:,} {split} images, where "
            f"guessing would reach {100 * report.chance:.2f} %"
        )
    if report.outputs == PROBABILITIES:
        yield "returns probabilities, and losses take logits: return what goes into its softmax"
    if report.outputs == LOG_PROBABILITIES:
        yield "returns log-probabilities: right for losses that apply a softmax, shifted in each row for logit_mse"


def add_onnx(job_dir: JobDir, network: ModelBundle, result: Mapping[str, Any], test: Evaluation) -> dict[str, Any]:
    """Write the ONNX file of a finished job that was made without one, and return its results.

    Raises:
        ModelError: As `finalize`.
    """
    network.model.load_state_dict(load_tensors(job_dir.model)[0])
    agreement = _write_onnx(job_dir, replace(network, model=network.model.eval().to(test.device)), test)
    result = {**result, "onnx_agreement": agreement, "onnx_bytes": job_dir.onnx.stat().st_size}
    job_dir.finish(result)
    return result


def _write(
    job_dir: JobDir,
    network: ModelBundle,
    history: Sequence[Mapping[str, Any]],
    test: Evaluation,
    report: EvalReport,
    *,
    with_onnx: bool,
    on_no_export: Callable[[str], None] | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    record = {"architecture": dict(network.architecture), "normalization": network.normalize.to_json()}
    save_model(job_dir.model, network.model, record)
    agreement = None
    if with_onnx:
        try:
            agreement = _write_onnx(job_dir, network, test)
        except ModelError as error:
            if on_no_export is None:
                raise
            remove_with_sum(job_dir.onnx)
            on_no_export(str(error))
    reached = report.metric.record(report.top1)
    chosen_by = deciding({**reached, **more})
    best = max(history, key=main_value, default={**chosen_by, "epoch": None})
    result = {
        **reached,
        LOSS_NAMES[report.task]: report.loss,
        f"best_{metric_of(chosen_by).name}": main_value(best),
        "best_epoch": best["epoch"],
        "num_epochs": len(history),
        **{key: line[key] for line in history[-1:] for key in ("stopped_by", "compute") if key in line},
        "num_parameters": count_parameters(network.model),
        "num_macs": count_macs(network.model, test.image_shape),
        "identity": network.identity,
        "onnx_agreement": agreement,
        "onnx_bytes": None if agreement is None else job_dir.onnx.stat().st_size,
        "wall_s": round(sum(line["wall_s"] for line in history), 3),
        "examined": report.to_json(),
        **({"at_chance": True} if report.is_at_chance() else {}),
        **more,
    }
    job_dir.finish(result)
    return result


def _write_onnx(job_dir: JobDir, network: ModelBundle, test: Evaluation) -> float:
    """Write the ONNX file, and return its agreement with the network on the first test images."""
    example = torch.zeros(2, *test.image_shape, device=test.device)
    export_onnx(network.model, example, job_dir.onnx, metadata=onnx_metadata(network, test))
    return require_agreement(job_dir.onnx, network, test).agreement


def onnx_metadata(network: ModelBundle, test: Evaluation) -> dict[str, str]:
    """Return the metadata of an ONNX file: normalization, image shape (C, H, W), test crop and class names.

    `view_size`, (H, W), is there if images are resized to the size of the views first, for `student.image_size`.
    """
    view_size = test.loader.dataset.image_size if test.loader.size is not None else None
    return {
        **({} if view_size is None else {"view_size": canonical_json(list(view_size))}),
        "normalization": canonical_json(network.normalize.to_json()),
        "image_shape": canonical_json(list(test.image_shape)),
        "test_crop": canonical_json(test.crop),
        "class_names": canonical_json(list(test.class_names)),
        **({} if test.task == CLASSIFICATION else {"task": canonical_json(test.task)}),
    }


def min_agreement(num_images: int) -> float:
    """Return the lowest top-1 agreement with torch on so many images with which an ONNX file is accepted."""
    return min(MIN_AGREEMENT, 1 - min(FEW_IMAGES / num_images, MAX_FEW_SHARE))


def require_agreement(path: Path, network: ModelBundle, test: Evaluation, *, whole_test: bool = False) -> OnnxAgreement:
    """Compare the ONNX file or IR at `path` with its network on the test images.

    Without `whole_test` only the first images are used. Raises ModelError, naming the first layer that diverges, if the
    share is below `min_agreement`, or the accuracies differ by more than MAX_ACCURACY_GAP.
    """
    found = check_onnx(path, network.model, test.batches(None if whole_test else CHECKED_IMAGES), test.warn, test.task)
    accuracies = (found.accuracy or 0.0, found.torch_accuracy or 0.0)
    max_gap = max(MAX_ACCURACY_GAP, 2 / found.num_samples)  # on a small test set two images are more
    wanted = min_agreement(found.num_samples) if test.task == CLASSIFICATION else MIN_AGREEMENT
    if found.agreement >= wanted - ROUNDING and abs(accuracies[0] - accuracies[1]) <= max_gap:
        return found
    against = " % against ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
    of_labels = "" if found.accuracy is None else f", with an accuracy of {against} %"
    where = f"{library_of(path)} computes something else"
    if library_of(path) == "onnxruntime":
        where = first_divergence(path, network.model, test.images(DEBUG_IMAGES).cpu())
    raise ModelError(
        f"{path} agrees with torch on {100 * found.agreement:.2f} % of {found.num_samples} test images, wanted "
        f"{100 * wanted:.3g} %{of_labels} (logits differ by up to {found.max_logit_difference:.3g}): {where}. "
        "Do not use it: train the network longer, or keep the first diverging layers in float "
        "(compress.quantize.exclude)."
    )
