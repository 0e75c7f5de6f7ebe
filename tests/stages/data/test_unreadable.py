"""Images that can no longer be read, and transforms that fail: told in a sentence, and all else stays as it was."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from support.device import DEVICE
from support.photographs import EQUAL, UNEQUAL, path_of, photographs
from support.reference_rendering import (
    CROPS,
    MIXED_CROPS,
    NUM_SAMPLES,
    VIEWS,
    check_labels,
    expected,
    loader_of,
    make_task,
    mixture_of,
    shuffled,
)

from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.renderer import Renderer


def damaged(path):
    path.write_bytes(path.read_bytes()[:60])


def edited(path):
    with Image.open(path) as image:
        other = Image.fromarray(255 - np.asarray(image))
    other.save(path)


DAMAGE = {
    "cannot be decoded": damaged,
    "cannot be read (No such file or directory)": os.unlink,
    "changed since the data set was first read": edited,
}


def without(image_set, views, positions, view, bad):
    """Which of `positions` are left where the images at the positions `bad` cannot be read."""
    ids, mixture = image_set.sample_ids[positions], mixture_of(image_set, views, positions, view)
    partners = ids if mixture is None else mixture.partner_ids
    bad_ids = image_set.sample_ids[torch.tensor(bad)]
    return positions[~torch.isin(ids, bad_ids) & ~torch.isin(partners, bad_ids)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", VIEWS)
def test_unreadable_images_are_reported_and_dropped(tmp_path, name, num_workers):
    views = VIEWS[name]
    image_set = photographs(tmp_path, NUM_SAMPLES, EQUAL if views.engine == "tensor" else UNEQUAL)
    requests = [ViewRequest(indices, view) for view in (0, 1) for indices in torch.split(shuffled(view), 13)]
    truth = {view: expected(image_set, views, torch.arange(NUM_SAMPLES), view) for view in (0, 1)}
    bad = dict(zip((4, 9, 17), DAMAGE, strict=True))
    for index, damage in bad.items():
        DAMAGE[damage](path_of(image_set, index))
    messages = []
    loader = loader_of(image_set, views, num_workers, on_failure=messages.append)
    lost_with_partner = 0
    for request, batch in zip(requests, loader.stream(requests), strict=True):
        kept = without(image_set, views, request.indices, request.view, list(bad))
        assert torch.equal(batch.indices, kept)
        assert torch.equal(batch.images, truth[request.view][kept])
        lost = set(request.indices.tolist()) - set(kept.tolist())
        lost_with_partner += len(lost - set(bad))
        if views.mix:
            assert torch.equal(batch.mixture.own_share, mixture_of(image_set, views, kept, request.view).own_share)
    assert (lost_with_partner > 0) == bool(views.mix), "samples whose partner is lost are lost too"
    for index, damage in bad.items():
        expected_message = f"sample {image_set.sample_ids[index]}: {path_of(image_set, index)} {damage}"
        assert sum(message.startswith(expected_message) for message in messages) >= 2, "in each of two views"
    assert len({message.partition(":")[0] for message in messages}) == len(bad), "for others nothing is told"
    assert not any("\n" in message for message in messages)


def test_labels_match_images_when_some_are_dropped(tmp_path):
    image_set = photographs(tmp_path, NUM_SAMPLES)
    messages = []
    task = make_task(loader_of(image_set, MIXED_CROPS, 0, on_failure=messages.append))
    path_of(image_set, int(task.order(1, 0)[2])).unlink()
    bad = [int(task.order(1, 0)[2])]
    (batch,) = task.stream(1, 20, epoch=0, step=0, epochs=1)
    kept = without(image_set, MIXED_CROPS, task.order(1, 0)[:20], 0, bad)
    assert messages
    assert len(batch.hard.labels) == len(kept) < 20
    check_labels(image_set, kept, 0, batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_require_all_raises_for_an_unreadable_image(tmp_path, num_workers):
    image_set = photographs(tmp_path, 6)
    path_of(image_set, 4).unlink()
    expected_message = rf"^sample {image_set.sample_ids[4]}: .*4\.png cannot be read \(No such file"
    messages = []
    dropping, default = (
        loader_of(image_set, CROPS, num_workers, **changes) for changes in ({"on_failure": messages.append}, {})
    )
    requests = [ViewRequest(indices, 0) for indices in torch.split(torch.arange(6), 2)]
    for loader, require_all in ((dropping, True), (default, False), (default, True)):
        stream = loader.stream(requests, require_all=require_all)
        assert [next(stream).indices.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(DataError, match=expected_message):
            next(stream)
    with pytest.raises(DataError, match=expected_message):
        dropping.get(requests[2])
    assert not messages
    assert [len(batch.indices) for batch in dropping.stream(requests)] == [2, 2, 1]
    assert len(messages) == 1


def test_on_failure_may_raise_and_the_pool_stays_usable(tmp_path):
    class Enough(Exception):
        pass

    def refuse(expected_message):
        raise Enough(expected_message)

    image_set = photographs(tmp_path, 6)
    path_of(image_set, 4).unlink()
    loader = loader_of(image_set, CROPS, 2, on_failure=refuse)
    with pytest.raises(Enough, match=r"4\.png"):
        list(loader.stream([ViewRequest(torch.arange(6), 0)] * 3))
    indices = torch.tensor([5, 0])
    assert torch.equal(loader.get(ViewRequest(indices, 1)).images, expected(image_set, CROPS, indices, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_without_readable_images_is_an_error(tmp_path, num_workers):
    image_set = photographs(tmp_path, 6)
    for index in (2, 3):
        path_of(image_set, index).unlink()
    messages = []
    loader = loader_of(image_set, CROPS, num_workers, on_failure=messages.append)
    with pytest.raises(
        DataError, match="^none of the 2 images of a batch of photographs can be read, including sample [0-9]+: "
    ):
        list(loader.stream([ViewRequest(torch.arange(0, 2), 0), ViewRequest(torch.arange(2, 4), 0)]))
    assert len(messages) == 2


def test_machine_error_drops_no_sample(tmp_path, monkeypatch):
    def refuse(path, **keys):
        raise OSError(24, "Too many open files")

    image_set = photographs(tmp_path, 6)
    messages = []
    loader = loader_of(image_set, CROPS, 0, on_failure=messages.append)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match="ran out of memory or file handles"):
        loader.get(ViewRequest(torch.arange(6), 0), require_all=False)
    assert not messages


RAISES = """
def raising(image):
    if image.width < 20:
        raise ValueError("two\\nlines")
    return image.resize((8, 8))

def made():
    return raising
"""

GIVES_UNEQUAL_SIZES = """
from torchvision.transforms.v2.functional import to_image

def made():
    return lambda image: to_image(image)[:, :32, :32]
"""

FAULTS = {
    RAISES: r"the transforms failed on sample \d+ \(.*two.*\)",
    GIVES_UNEQUAL_SIZES: r"\[views\] gives \(3, 12, 10\) .*sample \d+, .* and \(3, 32, 32\) for others",
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_error_of_a_user_transform_is_one_line(tmp_path, monkeypatch, number, num_workers):
    code, expected_message = list(FAULTS.items())[number]
    module = f"faulty_{number}_{num_workers}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    image_set = photographs(tmp_path, 6, UNEQUAL)
    views = Views(engine="transforms", transform=f"python:{module}:made")
    messages = []
    renderer = Renderer(views, 3, None)
    loader = ImageLoader(image_set, DEVICE, renderer, num_workers=num_workers, on_failure=messages.append)
    with pytest.raises(RecipeError, match=expected_message) as raised:
        list(loader.stream([ViewRequest(torch.arange(6), 0)]))
    assert "Traceback" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not messages
