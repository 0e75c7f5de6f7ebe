"""Compare an ONNX file's predictions with its network's, on any number of images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdpipe.stages.export.onnx_session import INPUT, OUTPUT, open_session
from kdpipe.stages.models.clone import clone_without_hooks


@dataclass(frozen=True)
class OnnxAgreement:
    """How closely a file and its network agree on `num_samples` images.

    Attributes:
        top1_agreement: The share of images with the same top-1 class.
        max_logit_difference: The largest difference of any logit; NaN if either has one.
        accuracy: The file's accuracy on the labeled images; None if there are none.
        torch_accuracy: The network's, likewise.
    """

    num_samples: int
    top1_agreement: float
    max_logit_difference: float
    accuracy: float | None = None
    torch_accuracy: float | None = None


def check_onnx(
    path: Path, model: nn.Module, batches: Tensor | Iterable[tuple[Tensor, Tensor | None]], batch_size: int = 250
) -> OnnxAgreement:
    """Run a file on the CPU and `model`, in eval mode on its own device, over the same images.

    The model stays unchanged. An INT8 file may differ from the prepared model by a few quantization steps at near-ties.

    Args:
        path: The ONNX file.
        model: The network it was exported from.
        batches: Normalized images [B, C, H, W] with labels [B] or None, on any device, consumed one batch at a time;
            or images alone [N, C, H, W].
        batch_size: The batch size for images alone.

    Raises:
        ModelError: If there is no ONNX network at `path`.
        ValueError: If there are no images.
    """
    session = open_session(path)
    reference = clone_without_hooks(model).eval()
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    sums = _Sums()
    with torch.no_grad(), _exact_products():
        for images, labels in _with_labels(batches, batch_size):
            found = torch.from_numpy(session.run([OUTPUT], {INPUT: images.cpu().float().numpy()})[0])
            sums.add(found, reference(images.to(device).float()).float().cpu(), labels)
    return sums.agreement()


def _with_labels(
    batches: Tensor | Iterable[tuple[Tensor, Tensor | None]], batch_size: int
) -> Iterable[tuple[Tensor, Tensor | None]]:
    if isinstance(batches, Tensor):
        return ((images, None) for images in torch.split(batches, batch_size))
    return batches


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Disable TF32: an INT8 grid does not survive it, and it is the default of CUDA's convolutions."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass
class _Sums:
    """The counts of a check."""

    num_samples: int = 0
    num_agreeing: int = 0
    num_labeled: int = 0
    num_correct: int = 0
    num_torch_correct: int = 0
    difference: Tensor | None = None

    def add(self, found: Tensor, expected: Tensor, labels: Tensor | None) -> None:
        """Count a batch: logits of the file and of the network [B, num_classes], labels [B]."""
        predictions, torch_predictions = found.argmax(dim=1), expected.argmax(dim=1)
        self.num_samples += len(found)
        self.num_agreeing += int((predictions == torch_predictions).sum())
        largest = (found - expected).abs().max()
        # torch's max, unlike Python's, propagates NaN
        self.difference = largest if self.difference is None else torch.maximum(self.difference, largest)
        if labels is not None:
            labels = labels.cpu()
            self.num_labeled += len(labels)
            self.num_correct += int((predictions == labels).sum())
            self.num_torch_correct += int((torch_predictions == labels).sum())

    def agreement(self) -> OnnxAgreement:
        if self.difference is None:
            raise ValueError("an ONNX file cannot be checked without images.")
        return OnnxAgreement(
            num_samples=self.num_samples,
            top1_agreement=self.num_agreeing / self.num_samples,
            max_logit_difference=float(self.difference),
            accuracy=self.num_correct / self.num_labeled if self.num_labeled else None,
            torch_accuracy=self.num_torch_correct / self.num_labeled if self.num_labeled else None,
        )
