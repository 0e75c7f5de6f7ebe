"""Copies between host and device: their values, types and layouts."""

import torch
from support.device import DEVICE, needs_gpu

from kdpipe.stages.runtime.gpu.transfers import download, empty_on_host, upload


def test_uploaded_images_are_the_same():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    moved = upload(images, DEVICE)
    assert moved.device == DEVICE
    assert torch.equal(moved.cpu(), images)
    assert upload(moved, DEVICE) is moved


def test_downloaded_rows_have_the_type_and_layout_of_targets():
    maps = torch.randn(3, 4, 2, 2).to(DEVICE, memory_format=torch.channels_last)
    logits = torch.randn(3, 5, device=DEVICE)
    targets = [empty_on_host((3, 4, 2, 2), torch.float16, DEVICE), empty_on_host((5, 5), torch.float32, DEVICE)]
    download([(targets[0], maps), (targets[1][1:4], logits)], DEVICE).wait()
    assert torch.equal(targets[0], maps.cpu().half().contiguous())
    assert targets[0].is_contiguous()
    assert torch.equal(targets[1][1:4], logits.cpu())


@needs_gpu
def test_host_memory_for_copies_is_pinned():
    assert empty_on_host((2,), torch.float32, DEVICE).is_pinned()
