"""Whether an ONNX file answers as its network does, on as many images as there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.compression.bare_copy import bare_copy
from stages.compression.onnx_graph import INPUT, OUTPUT, open_session
from stages.compression.onnx_parting import where_they_part

__all__ = ["OnnxAgreement", "check_onnx", "where_they_part"]


@dataclass(frozen=True)
class OnnxAgreement:
    """How far a file and its network agree on `num_samples` images.

    top1_agreement: the share of images with the same top-1 class. max_logit_difference: the largest one of any logit;
    NaN if either gives one. accuracy, torch_accuracy: the file's and the network's share of right answers among the
    images that came with a label; None if none did.
    """

    num_samples: int
    top1_agreement: float
    max_logit_difference: float
    accuracy: float | None = None
    torch_accuracy: float | None = None


def check_onnx(
    path: Path, model: nn.Module, batches: Tensor | Iterable[tuple[Tensor, Tensor | None]], batch_size: int = 250
) -> OnnxAgreement:
    """Run the file at `path` on the CPU and `model`, in eval mode, where it is, over the same images.

    batches: normalised images [B, C, H, W] with their labels [B] or None, on any device, as many as there are: each
    batch is forgotten before the next one is asked for. Images alone [N, C, H, W] are cut into batches of `batch_size`.
    The model stays as it is. An INT8 file may differ from the prepared model by a few quantization steps, where a value
    lies halfway between two. Raises ModelError if there is no ONNX network at `path`, ValueError without any image.
    """
    session = open_session(path)
    reference = bare_copy(model).eval()
    device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
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
    """Float32 products in full on a GPU too: an INT8 grid does not survive TF32, the default of its convolutions."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass
class _Sums:
    """What a check has counted so far."""

    num_samples: int = 0
    num_agreeing: int = 0
    num_labelled: int = 0
    num_correct: int = 0
    num_torch_correct: int = 0
    difference: Tensor | None = None

    def add(self, found: Tensor, expected: Tensor, labels: Tensor | None) -> None:
        """Count a batch: logits of the file and of the network [B, num_classes], labels [B]."""
        answers, torch_answers = found.argmax(dim=1), expected.argmax(dim=1)
        self.num_samples += len(found)
        self.num_agreeing += int((answers == torch_answers).sum())
        largest = (found - expected).abs().max()
        # torch's max, unlike Python's, lets a NaN through
        self.difference = largest if self.difference is None else torch.maximum(self.difference, largest)
        if labels is not None:
            labels = labels.cpu()
            self.num_labelled += len(labels)
            self.num_correct += int((answers == labels).sum())
            self.num_torch_correct += int((torch_answers == labels).sum())

    def agreement(self) -> OnnxAgreement:
        if self.difference is None:
            raise ValueError("an ONNX file cannot be checked without images.")
        labelled = self.num_labelled
        return OnnxAgreement(
            num_samples=self.num_samples,
            top1_agreement=self.num_agreeing / self.num_samples,
            max_logit_difference=float(self.difference),
            accuracy=self.num_correct / labelled if labelled else None,
            torch_accuracy=self.num_torch_correct / labelled if labelled else None,
        )
