"""A network with what belongs to it, and what every finished training job leaves of it in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.compression.onnx_file import check_onnx, export_onnx
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
            "normalisation": self.normalise.to_json(),
        }


def finish(
    folder: JobFolder,
    network: Network,
    history: Sequence[Mapping[str, Any]],
    setup: Setup,
    *,
    with_onnx: bool = True,
) -> dict[str, Any]:
    """Measure a trained network, leave its weights, ONNX file and figures in `folder`, and return the figures.

    Raises ModelError where the network cannot be exported, or its file does not answer as it does.
    """
    network.model.eval()
    examined = examine(network.model, setup.test(network.normalise), setup.device)
    record = {"architecture": dict(network.architecture), "normalisation": network.normalise.to_json()}
    save_model(folder.model, network.model, record)
    agreement = None
    if with_onnx:
        _write_onnx(folder, network, setup)
        agreement = _require_agreement(folder, network, setup)
    best = max(history, key=lambda line: line["accuracy"], default={"accuracy": examined.top1, "epoch": None})
    result = {
        "accuracy": examined.top1,
        "cross_entropy": examined.cross_entropy,
        "best_accuracy": best["accuracy"],
        "best_epoch": best["epoch"],
        "num_epochs": len(history),
        "num_parameters": count_parameters(network.model),
        "identity": network.identity,
        "onnx_agreement": agreement,
        "onnx_bytes": folder.onnx.stat().st_size if with_onnx else None,
        "wall_s": round(sum(line["wall_s"] for line in history), 3),
        "examined": examined.to_json(),
    }
    folder.finish(result)
    return result


def _write_onnx(folder: JobFolder, network: Network, setup: Setup) -> None:
    """Export the network; how to scale its input and what its classes are called travel in the file's metadata."""
    metadata = {
        "normalisation": canonical_json(network.normalise.to_json()),
        "class_names": canonical_json(list(setup.test_set.class_names)),
    }
    example = torch.zeros(2, *setup.image_shape, device=setup.device)
    export_onnx(network.model, example, folder.onnx, metadata=metadata)


def _require_agreement(folder: JobFolder, network: Network, setup: Setup) -> float:
    """The share of test images on which the file in `folder`, run by onnxruntime, gives the network's top-1 answer."""
    images = setup.test(network.normalise).images(CHECKED_IMAGES).cpu()
    found = check_onnx(folder.onnx, network.model, images, batch_size=250)
    if found.top1_agreement < LEAST_AGREEMENT:
        raise ModelError(
            f"{folder.onnx} agrees with torch on {100 * found.top1_agreement:.2f} % of {len(images)} test images, "
            f"below {100 * LEAST_AGREEMENT:.0f} % (logits differ by up to {found.max_logit_difference:.3g}): "
            "do not use it, and report the network with which it happened."
        )
    return found.top1_agreement
