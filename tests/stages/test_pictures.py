"""The pictures that networks see: the same wherever the images are, whoever renders them, whenever a job stops."""

import dataclasses
import itertools
import multiprocessing
import os
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photographs import EQUAL, UNEQUAL, held, path_of, photographs
from PIL import Image

from stages.errors import DataError, RecipeError
from stages.features import Outputs
from stages.lesson import Lesson, Normalisation
from stages.pictures import Pictures, Request
from stages.views.config import ViewsConfig
from stages.views.mix import MixConfig, mix
from stages.views.renderer import Renderer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")

CPU = torch.device("cpu")
NUM_SAMPLES = 26
MIX = MixConfig(mixup_alpha=0.6, cutmix_alpha=1.0, p=0.7)
CROPS = ViewsConfig(seed=5, operations=({"name": "RandomCrop", "padding": 2}, {"name": "RandomHorizontalFlip"}))
ANY = ViewsConfig(
    seed=5,
    engine="transforms",
    operations=(
        {"name": "RandomResizedCrop", "size": [8, 6]},
        {"name": "RandomHorizontalFlip"},
        {"name": "ColorJitter", "brightness": 0.4, "hue": 0.1},
    ),
)
MIXED_CROPS, MIXED_ANY = dataclasses.replace(CROPS, mix=MIX), dataclasses.replace(ANY, mix=MIX)
VIEWS = {"crops": CROPS, "mixed crops": MIXED_CROPS, "any": ANY, "mixed any": MIXED_ANY}
SCALING = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("equal"), NUM_SAMPLES)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("unequal"), NUM_SAMPLES, UNEQUAL)


@cache
def built(views_name, size, population):
    return Renderer(VIEWS[views_name], 3, size, torch.tensor(population))


def renderer_of(image_set, views, partners=None):
    """Made once for all tests, since a pipeline is tried out when it is made."""
    population = torch.sort((partners or image_set).sample_ids).values.tolist()
    name = next(name for name, one in VIEWS.items() if one is views)
    return built(name, image_set.image_size, tuple(population))


def pictures_of(image_set, views, num_workers, **changes):
    renderer = renderer_of(image_set, views, changes.get("partners"))
    return Pictures(image_set, CPU, renderer, num_workers=num_workers, **changes)


def mixture_of(image_set, views, positions, view, partners=None):
    return renderer_of(image_set, views, partners).mixture(image_set.sample_ids[positions], view)


def alone(image_set, views, at, view, partners=None):
    """The picture of one sample, made from raw images and by itself; its partner is in the same view of its own."""
    renderer, others = renderer_of(image_set, views, partners), partners or image_set

    def view_of(source, position):
        sample_id = source.sample_ids[position : position + 1]
        return renderer.batch(renderer.picture(source.read(position), int(sample_id), view)[None], sample_id, view)

    picture = view_of(image_set, at)
    mixture = renderer.mixture(image_set.sample_ids[at : at + 1], view)
    if mixture is None or not mixture.mixed.any():
        return picture[0]
    partner = others.sample_ids.tolist().index(int(mixture.partners[0]))
    return mix(picture, view_of(others, partner), mixture)[0]


def expected(image_set, views, positions, view, partners=None):
    return torch.stack([alone(image_set, views, at, view, partners) for at in positions.tolist()])


def shuffled(seed, num_samples=NUM_SAMPLES):
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))


def splits():
    """The samples in several orders, split into batches of several sizes, in several views."""
    asks = ((0, 7, 0), (1, 13, 2), (2, 26, 0), (3, 5, -1))
    return [Request(at, view) for seed, size, view in asks for at in torch.split(shuffled(seed), size)]


@pytest.mark.parametrize("name", VIEWS)
def test_pictures_are_the_same_wherever_they_are_made_and_however_batches_are_split(equal, unequal, name):
    views = VIEWS[name]
    image_set = equal if views.engine == "tensor" else unequal
    truth = {view: expected(image_set, views, torch.arange(NUM_SAMPLES), view) for view in (0, 2, -1)}
    assert not torch.equal(truth[0], truth[2]), "views differ, else the test would see nothing"
    everywhere = [pictures_of(image_set, views, num_workers) for num_workers in (0, 1, 2, 3)]
    if views.engine == "tensor":
        everywhere.append(pictures_of(held(image_set), views, 2))
    for pictures in everywhere:
        seen = list(pictures.stream(splits()))
        assert len(seen) == len(splits())
        for asked, got in zip(splits(), seen, strict=True):
            assert torch.equal(got.positions, asked.positions)
            assert torch.equal(got.images, truth[asked.view][asked.positions])


def test_any_transforms_of_held_images_are_workers_business_and_the_same(equal):
    at = shuffled(0)
    seen = pictures_of(held(equal), MIXED_ANY, 2).one(Request(at, 1))
    assert torch.equal(seen.images, expected(equal, MIXED_ANY, at, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_shown_as_they_are_where_no_view_is_asked_for(equal, num_workers):
    at = shuffled(1)
    raw = held(equal).images[at]
    for pictures in (Pictures(equal, CPU, num_workers=num_workers), pictures_of(equal, MIXED_CROPS, num_workers)):
        seen = pictures.one(Request(at))
        assert torch.equal(seen.images, raw)
        assert seen.mixture is None


def test_images_of_unequal_size_as_they_are_make_no_batch_and_two_are_named(unequal):
    with pytest.raises(DataError, match=r"unequal size: .*0\.png is 10 x 12, .*1\.png is 14 x 9: set data\.image_size"):
        Pictures(unequal, CPU, num_workers=0).one(Request(torch.arange(4)))


def test_partners_may_come_from_a_larger_data_set(equal):
    part, at = equal.take(torch.tensor([20, 3, 11, 8])), torch.tensor([2, 0, 3, 1])
    truth = expected(part, MIXED_CROPS, at, 1, equal)
    outside = set(mixture_of(part, MIXED_CROPS, at, 1, equal).partners.tolist()) - set(part.sample_ids.tolist())
    assert outside, "else the test would see nothing"
    for own, partners in itertools.product((part, held(part)), (equal, held(equal))):
        pictures = pictures_of(own, MIXED_CROPS, 0, partners=partners)
        assert torch.equal(pictures.one(Request(at, 1)).images, truth)
        assert pictures.labels_of(equal.sample_ids[at]).tolist() == equal.labels[at].tolist()


@pytest.mark.parametrize(("num_workers", "started"), [(0, 0), (2, 2), (None, len(os.sched_getaffinity(0)))])
def test_as_many_workers_are_started_as_are_asked_for(equal, num_workers, started):
    before = set(multiprocessing.active_children())
    pictures = pictures_of(equal, CROPS, num_workers)
    pictures.one(Request(torch.arange(4), 0))
    pictures.one(Request(torch.arange(4), 1))
    assert len(set(multiprocessing.active_children()) - before) == started


def test_held_images_need_no_workers(equal):
    before = set(multiprocessing.active_children())
    pictures = pictures_of(held(equal), CROPS, 2)
    pictures.one(Request(torch.arange(4), 0))
    assert set(multiprocessing.active_children()) == before


def lesson_of(pictures, **changes):
    return Lesson(pictures, num_views=2, normalise=SCALING, **changes)


def same(left, right):
    fields = ("images", "labels", "partner_labels", "own_share")
    return all(torch.equal(getattr(left, field), getattr(right, field)) for field in fields)


@pytest.mark.parametrize("fresh_views", [False, True])
def test_a_lesson_that_begins_in_the_middle_goes_on_with_the_very_batches(equal, fresh_views):
    ahead = lesson_of(pictures_of(equal, MIXED_CROPS, 2), fresh_views=fresh_views)
    here = lesson_of(pictures_of(held(equal), MIXED_CROPS, 0), fresh_views=fresh_views)
    undisturbed = list(here.stream(3, 8, epoch=0, step=0, epochs=3))
    assert len(undisturbed) == 9, "3 epochs of 3 full batches"
    assert not any(same(undisturbed[0], other) for other in undisturbed[1:])
    for epoch, step in ((0, 0), (1, 2), (0, 1), (2, 0)):
        batches = ahead.stream(3, 8, epoch=epoch, step=step, epochs=3)
        wanted = undisturbed[3 * epoch + step :]
        for batch, other in zip(list(batches), wanted, strict=True):
            assert same(batch, other)
        left = ahead.stream(3, 8, epoch=epoch, step=step, epochs=3)  # half-way: the next one does not notice
        assert same(next(left), wanted[0])


def test_epochs_show_the_views_that_stores_hold_or_else_fresh_ones(equal):
    pictures = pictures_of(held(equal), CROPS, 0)
    for fresh_views, views in ((False, (0, 1, 0, 1)), (True, (-1, -2, -3, -4))):
        lesson = lesson_of(pictures, fresh_views=fresh_views)
        for epoch, view in enumerate(views):
            batch = next(lesson.stream(0, 8, epoch=epoch, step=0, epochs=epoch + 1))
            at = lesson.order(0, epoch)[:8]
            assert torch.equal(batch.images, SCALING(expected(equal, CROPS, at, view)))


class AskedTargets:
    """Targets that are what was asked for."""

    slabs = None

    def known(self, positions):
        return None

    def batch(self, view, positions):
        return view, positions.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_targets_are_those_of_the_pictures_though_these_are_asked_for_ahead(equal, num_workers):
    lesson = lesson_of(pictures_of(equal, CROPS, num_workers), targets=AskedTargets())
    batches = lesson.stream(3, 8, epoch=1, step=2, epochs=4)
    asked = [(1, 2), *((epoch, step) for epoch in (2, 3) for step in range(3))]
    for (epoch, step), batch in zip(asked, batches, strict=True):
        at = lesson.order(3, epoch)[8 * step : 8 * step + 8]
        assert batch.teachers == (epoch % 2, at.tolist())
        assert torch.equal(batch.images, SCALING(expected(equal, CROPS, at, epoch % 2)))


def check_labels(image_set, positions, view, batch):
    """Own and partners' labels and shares of a batch, and its loss, each by hand."""
    mixture = mixture_of(image_set, MIXED_CROPS, positions, view)
    label_of = dict(zip(image_set.sample_ids.tolist(), image_set.labels.tolist(), strict=True))
    assert torch.equal(batch.labels, image_set.labels[positions])
    assert batch.partner_labels.tolist() == [label_of[one] for one in mixture.partners.tolist()]
    assert torch.equal(batch.own_share, mixture.own_share)
    assert 0 < mixture.mixed.sum() < len(positions), "some are mixed and some are not"
    logits = torch.randn(len(positions), 4, generator=torch.Generator().manual_seed(0))
    log_p, rows = F.log_softmax(logits.double(), 1), torch.arange(len(positions))
    own, partners = -log_p[rows, batch.labels], -log_p[rows, batch.partner_labels]
    share = mixture.own_share.double()
    by_hand = (share * own + (1 - share) * partners).mean()
    said = lesson_of(None, hard_label_weight=0.5).losses(Outputs(logits, {}), batch)
    assert list(said) == ["hard_labels"]
    assert float(said["hard_labels"]) == pytest.approx(0.5 * float(by_hand), rel=1e-5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_has_the_labels_of_both_by_their_shares(equal, num_workers):
    lesson = lesson_of(pictures_of(equal, MIXED_CROPS, num_workers))
    for epoch, batch in enumerate(lesson.stream(1, 20, epoch=0, step=0, epochs=2)):
        check_labels(equal, lesson.order(1, epoch)[:20], epoch, batch)


def damaged(path):
    path.write_bytes(path.read_bytes()[:60])


def edited(path):
    with Image.open(path) as image:
        other = Image.fromarray(255 - np.asarray(image))
    other.save(path)


DAMAGE = {
    "cannot be decoded": damaged,
    "cannot be read (No such file or directory)": os.unlink,
    "has other pixels than when the data set was first read": edited,
}


def without(image_set, views, positions, view, bad):
    """Which of `positions` are left where the images at the positions `bad` cannot be read."""
    ids, mixture = image_set.sample_ids[positions], mixture_of(image_set, views, positions, view)
    partners = ids if mixture is None else mixture.partners
    bad_ids = image_set.sample_ids[torch.tensor(bad)]
    return positions[~torch.isin(ids, bad_ids) & ~torch.isin(partners, bad_ids)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", VIEWS)
def test_what_cannot_be_read_is_told_of_and_all_else_stays_as_it_was(tmp_path, name, num_workers):
    views = VIEWS[name]
    image_set = photographs(tmp_path, NUM_SAMPLES, EQUAL if views.engine == "tensor" else UNEQUAL)
    requests = [Request(at, view) for view in (0, 1) for at in torch.split(shuffled(view), 13)]
    truth = {view: expected(image_set, views, torch.arange(NUM_SAMPLES), view) for view in (0, 1)}
    bad = dict(zip((4, 9, 17), DAMAGE, strict=True))
    for at, damage in bad.items():
        DAMAGE[damage](path_of(image_set, at))
    told = []
    pictures = pictures_of(image_set, views, num_workers, on_failure=told.append)
    lost_with_partner = 0
    for asked, seen in zip(requests, pictures.stream(requests), strict=True):
        kept = without(image_set, views, asked.positions, asked.view, list(bad))
        assert torch.equal(seen.positions, kept)
        assert torch.equal(seen.images, truth[asked.view][kept])
        lost = set(asked.positions.tolist()) - set(kept.tolist())
        lost_with_partner += len(lost - set(bad))
        if views.mix:
            assert torch.equal(seen.mixture.own_share, mixture_of(image_set, views, kept, asked.view).own_share)
    assert (lost_with_partner > 0) == bool(views.mix), "samples whose partner is lost are lost too"
    for at, damage in bad.items():
        sentence = f"sample {image_set.sample_ids[at]}: {path_of(image_set, at)} {damage}"
        assert sum(one.startswith(sentence) for one in told) >= 2, "in each of two views"
    assert len({one.partition(":")[0] for one in told}) == len(bad), "of others nothing is told"
    assert not any("\n" in one for one in told)


def test_labels_follow_their_pictures_where_some_are_lost(tmp_path):
    image_set = photographs(tmp_path, NUM_SAMPLES)
    told = []
    lesson = lesson_of(pictures_of(image_set, MIXED_CROPS, 0, on_failure=told.append))
    path_of(image_set, int(lesson.order(1, 0)[2])).unlink()
    bad = [int(lesson.order(1, 0)[2])]
    (batch,) = lesson.stream(1, 20, epoch=0, step=0, epochs=1)
    kept = without(image_set, MIXED_CROPS, lesson.order(1, 0)[:20], 0, bad)
    assert told
    assert len(batch.labels) == len(kept) < 20
    check_labels(image_set, kept, 0, batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_where_all_must_be_had_one_that_cannot_be_read_stops_it(tmp_path, num_workers):
    image_set = photographs(tmp_path, 6)
    path_of(image_set, 4).unlink()
    sentence = rf"^sample {image_set.sample_ids[4]}: .*4\.png cannot be read \(No such file"
    told = []
    dropping, default = (
        pictures_of(image_set, CROPS, num_workers, **changes) for changes in ({"on_failure": told.append}, {})
    )
    requests = [Request(at, 0) for at in torch.split(torch.arange(6), 2)]
    for pictures, whole in ((dropping, True), (default, False), (default, True)):
        stream = pictures.stream(requests, whole=whole)
        assert [next(stream).positions.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(DataError, match=sentence):
            next(stream)
    with pytest.raises(DataError, match=sentence):
        dropping.one(requests[2])
    assert not told
    assert [len(seen.positions) for seen in dropping.stream(requests)] == [2, 2, 1]
    assert len(told) == 1


def test_what_on_failure_raises_ends_the_stream_and_the_pool_serves_the_next(tmp_path):
    class Enough(Exception):
        pass

    def refuse(sentence):
        raise Enough(sentence)

    image_set = photographs(tmp_path, 6)
    path_of(image_set, 4).unlink()
    pictures = pictures_of(image_set, CROPS, 2, on_failure=refuse)
    with pytest.raises(Enough, match=r"4\.png"):
        list(pictures.stream([Request(torch.arange(6), 0)] * 3))
    at = torch.tensor([5, 0])
    assert torch.equal(pictures.one(Request(at, 1)).images, expected(image_set, CROPS, at, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_of_which_nothing_can_be_read_is_an_error(tmp_path, num_workers):
    image_set = photographs(tmp_path, 6)
    for at in (2, 3):
        path_of(image_set, at).unlink()
    told = []
    pictures = pictures_of(image_set, CROPS, num_workers, on_failure=told.append)
    with pytest.raises(DataError, match="^not one of 2 images of photographs can be read"):
        list(pictures.stream([Request(torch.arange(0, 2), 0), Request(torch.arange(2, 4), 0)]))
    assert len(told) == 2


def test_a_fault_that_is_not_the_images_own_drops_no_sample(tmp_path, monkeypatch):
    def refuse(path, **keys):
        raise OSError(24, "Too many open files")

    image_set = photographs(tmp_path, 6)
    told = []
    pictures = pictures_of(image_set, CROPS, 0, on_failure=told.append)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match="not the file's fault"):
        pictures.one(Request(torch.arange(6), 0), whole=False)
    assert not told


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
    RAISES: r"the transforms fail on sample \d+ \(.*two.*\)",
    GIVES_UNEQUAL_SIZES: r"\[views\] makes \(3, 12, 10\) .*sample \d+, .* and \(3, 32, 32\) of others",
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_of_the_users_transform_is_one_sentence(tmp_path, monkeypatch, number, num_workers):
    code, sentence = list(FAULTS.items())[number]
    module = f"faulty_{number}_{num_workers}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    image_set = photographs(tmp_path, 6, UNEQUAL)
    views = ViewsConfig(engine="transforms", transform=f"python:{module}:made")
    told = []
    renderer = Renderer(views, 3, None)
    pictures = Pictures(image_set, CPU, renderer, num_workers=num_workers, on_failure=told.append)
    with pytest.raises(RecipeError, match=sentence) as raised:
        list(pictures.stream([Request(torch.arange(6), 0)]))
    assert "Traceback" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not told
