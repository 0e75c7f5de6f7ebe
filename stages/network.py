"""A network with what belongs to it, and what every finished training job leaves of it in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.compression.complexity import count_macs
from stages.compression.onnx_check import check_onnx, where_they_part
from stages.compression.onnx_file import export_onnx
from stages.errors import ModelError
from stages.examine import examine
from stages.job_folder import JobFolder
from stages.lesson import Normalisation
from stages.model_file import save_model
from stages.models.weights import count_parameters, weights_sha256
from stages.setup import Setup
from store import canonical_json

CHECKED_IMAGES = 1000
"""Test images on which an exported file must agree with torch."""

LEAST_AGREEMENT = 0.99
"""A file whose top-1 answers agree with torch's less often than this is not handed out."""

MOST_APART = 0.001
"""Nor is one whose accuracy is further than this, and than two images, from torch's."""

PARTING_IMAGES = 32
"""Images on which it is looked for where they part."""


@dataclass(frozen=True)
class Network:
    """A network, the record from which it can be built again, and how its input is scaled."""

    model: nn.Module
    architecture: Mapping[str, Any]
    normalise: Normalisation

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this network: architecture, all its weights, and how its input is scaled."""
        return {
            "architecture": dict(self.architecture),
            "weights_sha256": weights_sha256(self.model),
            "normalization": self.normalise.to_json(),
        }


def finish(
    folder: JobFolder,
    network: Network,
    history: Sequence[Mapping[str, Any]],
    setup: Setup,
    *,
    with_onnx: bool = True,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a trained network, leave its weights, ONNX file and figures in `folder`, and return the figures.

    Of several processes the first does so, and all return its figures. more: what else these say. Raises ModelError
    where the network cannot be exported, or its file does not answer as it does, on the first test images.
    """
    network.model.eval()
    return setup.processes.once(lambda: _finish(folder, network, history, setup, with_onnx=with_onnx, more=more or {}))


def _finish(
    folder: JobFolder,
    network: Network,
    history: Sequence[Mapping[str, Any]],
    setup: Setup,
    *,
    with_onnx: bool,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    examined = examine(network.model, setup.test(network.normalise), setup.device)
    record = {"architecture": dict(network.architecture), "normalization": network.normalise.to_json()}
    save_model(folder.model, network.model, record)
    agreement = None
    if with_onnx:
        example = torch.zeros(2, *setup.image_shape, device=setup.device)
        export_onnx(network.model, example, folder.onnx, metadata=onnx_metadata(network, setup))
        agreement = require_agreement(folder.onnx, network, setup)
    best = max(history, key=lambda line: line["accuracy"], default={"accuracy": examined.top1, "epoch": None})
    result = {
        "accuracy": examined.top1,
        "cross_entropy": examined.cross_entropy,
        "best_accuracy": best["accuracy"],
        "best_epoch": best["epoch"],
        "num_epochs": len(history),
        "num_parameters": count_parameters(network.model),
        "num_macs": count_macs(network.model, setup.image_shape),
        "identity": network.identity,
        "onnx_agreement": agreement,
        "onnx_bytes": folder.onnx.stat().st_size if with_onnx else None,
        "wall_s": round(sum(line["wall_s"] for line in history), 3),
        "examined": examined.to_json(),
        **more,
    }
    folder.finish(result)
    return result


def onnx_metadata(network: Network, setup: Setup) -> dict[str, str]:
    """What travels in an ONNX file: how to scale the images, their shape (C, H, W), and what the classes are called."""
    return {
        "normalization": canonical_json(network.normalise.to_json()),
        "image_shape": canonical_json(list(setup.image_shape)),
        "class_names": canonical_json(list(setup.test_set.class_names)),
    }


def require_agreement(path: Path, network: Network, setup: Setup, *, whole_test: bool = False) -> float:
    """The share of test images, all or the first of them, on which the file at `path`, run by onnxruntime, gives the
    network's top-1 answer. Raises ModelError, saying where the two part, where it is below LEAST_AGREEMENT, or their
    accuracies lie more than MOST_APART from each other.
    """
    test = setup.test(network.normalise)
    found = check_onnx(path, network.model, test.batches(None if whole_test else CHECKED_IMAGES))
    accuracies = (found.accuracy or 0.0, found.torch_accuracy or 0.0)
    most_apart = max(MOST_APART, 2 / found.num_samples)  # two images of a small test set are more than that
    if found.top1_agreement >= LEAST_AGREEMENT and abs(accuracies[0] - accuracies[1]) <= most_apart:
        return found.top1_agreement
    where = where_they_part(path, network.model, test.images(PARTING_IMAGES).cpu())
    raise ModelError(
        f"{path} agrees with torch on {100 * found.top1_agreement:.2f} % of {found.num_samples} test images, wanted "
        f"{100 * LEAST_AGREEMENT:.0f} %, with an accuracy of {100 * accuracies[0]:.2f} % against "
        f"{100 * accuracies[1]:.2f} % (logits differ by up to {found.max_logit_difference:.3g}): {where}. Do not "
        "use it: a network that is trained longer is surer of its answers, and what parts first can stay float "
        "(compress.quantize.keep_float)."
    )
