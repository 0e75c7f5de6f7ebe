"""Compare an exported file's predictions with its network's, on any number of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.data.measures import agreement
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.export.onnx_session import INPUT, OUTPUT
from kdpipe.stages.export.runtimes import open_file
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.runtime.memory import run_in_chunks


@dataclass(frozen=True)
class OnnxAgreement:
    """How closely a file and its network agree on `num_samples` images.

    Attributes:
        agreement: The share of images with the same top-1 class, or as `kdpipe.stages.data.measures.agreement` says.
        max_logit_difference: The largest difference of any logit; NaN if either has one.
        accuracy: The file's accuracy on the labeled images, None without any.
        torch_accuracy: The network's.
    """

    num_samples: int
    agreement: float
    max_logit_difference: float
    accuracy: float | None
    torch_accuracy: float | None


def check_onnx(
    path: Path,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    warn: Callable[[str], None] | None = None,
    task: Task = CLASSIFICATION,
) -> OnnxAgreement:
    """Run a file on the CPU and `model`, in eval mode on its own device, over the same images.

    The model stays unchanged. An INT8 file may differ from the prepared model by a few quantization steps at near-ties.

    Args:
        path: The ONNX file, OpenVINO's IR (.xml), or ExecuTorch's program (.pte).
        model: The network it was exported from.
        batches: Normalized images [B, C, H, W] with labels [B], on any device, consumed one batch at a time. One that
            does not fit into memory is halved until it does.
        warn: Receives a sentence about such batches.
        task: What the outputs are.

    Raises:
        ModelError: If there is no such network at `path`, or its runtime is not installed.
    """
    session = open_file(path)
    reference = clone_without_hooks(model).eval()
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    rows, differences = [], []  # the file's class, the network's and the label of each image
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    # An INT8 grid does not survive TF32, the default of CUDA's convolutions.
    with torch.no_grad(), tf32(enabled=False):
        for images, labels in batches:

            def logits_of(some: slice, images: Tensor = images) -> tuple[Tensor, Tensor]:
                found = torch.from_numpy(session.run([OUTPUT], {INPUT: images[some].cpu().float().numpy()})[0])
                return found, reference(images[some].to(device).float()).float().cpu()

            pairs = list(run_in_chunks(model, len(images), logits_of, warn))
            found, expected = (torch.cat(chunks) for chunks in zip(*pairs, strict=True))
            rows.append(torch.stack([found.argmax(1), expected.argmax(1), labels.cpu()]))
            differences.append((found - expected).abs().max())
            if task != CLASSIFICATION:
                outputs[0].append(expected)
                outputs[1].append(found)
    predicted, torch_predicted, labels = torch.cat(rows, dim=1)
    known = (labels >= 0) & (task == CLASSIFICATION)
    return OnnxAgreement(
        num_samples=len(labels),
        agreement=(
            _share(predicted == torch_predicted)
            if task == CLASSIFICATION
            else agreement(task, torch.cat(outputs[0]), torch.cat(outputs[1]))
        ),
        max_logit_difference=float(torch.stack(differences).max()),  # torch's max, unlike Python's, propagates NaN
        accuracy=_share((predicted == labels)[known]) if known.any() else None,
        torch_accuracy=_share((torch_predicted == labels)[known]) if known.any() else None,
    )


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
