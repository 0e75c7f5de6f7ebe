"""A store is replayed or refused: its identity holds digests of images, so that no other pixels pass for its own."""

import dataclasses
import hashlib
import importlib
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.made_store import folder_bytes
from support.tiny_run import CACHE, LAYERS, LOSSES, STUDENT, TEACHER, VIEWS, make_tiny_store, squares, tiny_context
from torchvision.transforms import v2

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher import plan as store_plan
from kdpipe.stages.cache_teacher.recheck import recompute
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import view_warning
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.versions import library_versions
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.views import renderer as renderer_room
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.mix import MixConfig
from kdpipe.stages.views.ops.crop import RandomHorizontalFlip
from kdpipe.stages.views.renderer import NUM_PROBES, UNEQUAL_PROBES, Renderer, check_views
from kdpipe.store import FingerprintMismatch

CROP, FLIP = {"name": "RandomCrop", "padding": 2}, {"name": "RandomHorizontalFlip"}
RESIZED = ({"name": "RandomResizedCrop", "size": [20, 24]}, FLIP)
TENSOR = Views(operations=(CROP, FLIP))
TRANSFORMS = Views(engine="transforms", operations=RESIZED)
MIXED = dataclasses.replace(TENSOR, mix=MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0))
PARTNER_POOL = torch.arange(0, 3000, 3)

KNOWN_PROBES = {
    "tensor": [
        "98d1f1ae034d1f41c64621dc8d9ece8d6d941d206d1028d8b268502ee1fbdccb",
        "6eb22fbcf97109b8552577e763a9ecc08bed1f9ce641a24cb7629612f72b6a75",
        "7b8518ea93723b395a5b241a6f5fed5b8072f2cc1a63950da0d1e5699d7f1903",
    ],
    "mixed": [
        "5cbdb66c4515b5282cfe3f9dbcabf43771a5ffe0c0573975f91a1a405dc70c39",
        "780dc82256d54b8be64936f553d0dcebd161157e557fe6acf5dd7bbd08639a0b",
        "6d3bb381947ca2af5ad7216a9fa0160cc11f7a2dd0af113003ec7d7a34b3aea9",
    ],
}
"""Of images of 3 x 9 x 7. Never change one: a store of years ago that says so must still be taught from."""


def renderer(views, size=(9, 7), channels=3, partner_pool=PARTNER_POOL):
    return Renderer(views, channels, size, partner_pool)


def with_views(views, **changes):
    return dataclasses.replace(views, **changes)


@pytest.mark.parametrize(
    ("views", "sizes"),
    [
        (TENSOR, [(9, 7)] * NUM_PROBES),
        (with_views(TRANSFORMS, operations=(FLIP,)), [(9, 7)] * NUM_PROBES),
        (TRANSFORMS, UNEQUAL_PROBES),
    ],
    ids=["tensor", "transforms, as large as they are", "transforms, one size of any"],
)
def test_identity_has_a_digest_of_rendered_probes_per_view(views, sizes):
    """Each image here rendered by itself, by what a student's batches go through."""
    made, digests = renderer(views), []
    for view in range(3):
        random_images = []
        for number, pattern in enumerate(patterns(sizes)):
            drawn = made.render_image(pattern, number, view)
            random_images.append(made.render_batch(drawn[None], torch.tensor([number]), view))
        digests.append(hashlib.sha256(torch.cat(random_images).numpy().tobytes()).hexdigest())
    assert made.identity["probes_sha256"] == digests
    assert len(set(digests)) == 3


def patterns(sizes):
    ends = np.cumsum([3 * height * width for height, width in sizes])
    cells = np.split((np.arange(ends[-1]) * 31 % 251).astype(np.uint8), ends[:-1])
    return [some.reshape(3, *size) for some, size in zip(cells, sizes, strict=True)]


@pytest.mark.parametrize("name", ["tensor", "mixed"])
def test_reference_images_are_unchanged(name):
    assert renderer({"tensor": TENSOR, "mixed": MIXED}[name]).identity["probes_sha256"] == KNOWN_PROBES[name]


@pytest.mark.parametrize("views", [TENSOR, TRANSFORMS, MIXED], ids=["tensor", "transforms", "mixed"])
def test_more_views_of_a_recipe_are_the_same_views(views):
    more = with_views(views, num_views=views.num_views + 5)
    assert renderer(more).identity == renderer(views).identity


@pytest.mark.parametrize(
    ("views", "other", "differing"),
    [
        (TENSOR, with_views(TENSOR, seed=1), {"seed", "probes_sha256"}),
        (TENSOR, with_views(TENSOR, operations=(FLIP,)), {"operations", "probes_sha256"}),
        (TRANSFORMS, with_views(TRANSFORMS, seed=1), {"seed", "probes_sha256"}),
        (TRANSFORMS, with_views(TRANSFORMS, operations=RESIZED[:1]), {"operations", "probes_sha256"}),
        (MIXED, with_views(MIXED, mix=MixConfig(mixup_alpha=0.5)), {"mix", "probes_sha256"}),
        (MIXED, TENSOR, {"mix", "probes_sha256"}),
    ],
)
def test_identity_changes_with_the_pixels(views, other, differing):
    one, another = renderer(views).identity, renderer(other).identity
    assert {key for key in one | another if one.get(key) != another.get(key)} == differing


def test_other_partners_are_another_mixture():
    one, another = renderer(MIXED).identity, renderer(MIXED, partner_pool=PARTNER_POOL[1:]).identity
    assert {key for key in one if one[key] != another[key]} == {"mix"}
    assert (one["mix"]["num_partners"], another["mix"]["num_partners"]) == (1000, 999)
    assert one["mix"]["partner_ids_sha256"] != another["mix"]["partner_ids_sha256"]


@pytest.mark.parametrize(
    ("room", "name", "views"),
    [
        (RandomHorizontalFlip, "overwrite", TENSOR),
        (v2.RandomHorizontalFlip, "transform", TRANSFORMS),
        (renderer_room, "mix", MIXED),
    ],
    ids=["tensor", "torchvision", "mix"],
)
def test_another_implementation_changes_only_the_probes(monkeypatch, room, name, views):
    """As a new version of torchvision may be: the recipe says the same, and one pixel is another one."""
    before, real = renderer(views).identity, getattr(room, name)
    monkeypatch.setattr(room, name, lambda *arguments: one_off(real(*arguments)))
    after = renderer(views).identity
    assert [key for key in before if before[key] != after[key]] == ["probes_sha256"]


def one_off(image):
    """The same with its first pixel one level brighter."""
    if isinstance(image, Image.Image):
        pixels = np.asarray(image).copy()
        pixels[0, 0] += 1
        return Image.fromarray(pixels)
    image = image.clone()
    image[..., 0, 0] += 1
    return image


OPERATIONS = ({"name": "Resize", "size": [8, 8]}, {"name": "RandomHorizontalFlip"})
STORED = {
    "tensor": VIEWS,
    "transforms": Views(num_views=3, engine="transforms", operations=OPERATIONS),
    "python": Views(num_views=3, engine="transforms", transform="python:my_views:pipeline"),
}
PIPELINE = """
from torchvision.transforms import v2

pipeline = v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomHorizontalFlip()])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run, and in it a finished store, of each kind of views."""
    folder = tmp_path_factory.mktemp("replayed")
    write_pipeline(folder, PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        with pytest.MonkeyPatch.context() as years_ago:
            years_ago.setattr(store_plan, "library_versions", lambda: library_versions() | {"torchvision": "0.1"})
            for name in STORED:
                make_tiny_store(setup_of(folder, name))
        yield folder
    sys.modules.pop("my_views", None)


def write_pipeline(folder, source):
    """Write a user's module, and forget it as a new process would not know it."""
    (folder / "my_views.py").write_text(source)
    sys.modules.pop("my_views", None)
    importlib.invalidate_caches()


def setup_of(folder, name, views=None):
    return tiny_context(folder / name, train_set=squares(60, 0), num_workers=0, views=views or STORED[name])


def ways(folder, name, views):
    """All ways in which a store is met again."""
    context, path = setup_of(folder, name, views), folder / name / "store.zarr"
    teacher = load_teacher(TEACHER, 0, context)
    return {
        "student": lambda: open_distillation([path], LOSSES, STUDENT, {}, context),
        "cache-teacher": lambda: cache_teacher(CACHE, path, teacher, LAYERS, context),
        "recompute": lambda: recompute(path, teacher, context, 30, 0),
    }


WAYS = ["student", "cache-teacher", "recompute"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STORED)
def test_a_store_of_the_same_views_is_replayed(runs, name, way):
    before = folder_bytes(runs / name / "store.zarr")
    given = ways(runs, name, STORED[name])[way]()
    assert folder_bytes(runs / name / "store.zarr") == before
    if way == "recompute":
        assert given.differing == ()


def refused(runs, name, way, views=None):
    """The sentence with which a store is refused; it is left as it is."""
    before = folder_bytes(runs / name / "store.zarr")
    with pytest.raises(FingerprintMismatch) as raised:
        ways(runs, name, views or STORED[name])[way]()
    assert folder_bytes(runs / name / "store.zarr") == before
    return str(raised.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["tensor", "transforms"])
def test_an_edited_recipe_is_refused_by_name(runs, name, way):
    fewer = with_views(STORED[name], operations=STORED[name].operations[:1])
    assert re.search(r"views\.operations: stored .*RandomHorizontalFlip.*, wanted ", refused(runs, name, way, fewer))
    another = with_views(STORED[name], seed=7)
    assert "views.seed: stored 0, wanted 7" in refused(runs, name, way, another)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "room", "method"),
    [("tensor", RandomHorizontalFlip, "overwrite"), ("transforms", v2.RandomHorizontalFlip, "transform")],
)
def test_other_pixels_are_refused_though_the_recipe_is_the_same(runs, monkeypatch, name, way, room, method):
    real = getattr(room, method)
    monkeypatch.setattr(room, method, lambda *arguments: one_off(real(*arguments)))
    sentence = refused(runs, name, way)
    assert "views.probes_sha256" in sentence
    assert "views.operations" not in sentence


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (PIPELINE.replace("padding=1", "padding=2"), {"views.transform_source_sha256", "views.probes_sha256"}),
        (PIPELINE + "# no other pictures, but who knows\n", {"views.transform_source_sha256"}),
    ],
    ids=["other pictures", "a comment"],
)
def test_an_edited_pipeline_of_the_users_own_is_refused(runs, way, edit, named):
    write_pipeline(runs, edit)
    try:
        sentence = refused(runs, "python", way)
    finally:
        write_pipeline(runs, PIPELINE)
    assert set(re.findall(r"views\.\w+", sentence)) == named
    ways(runs, "python", STORED["python"])[way]()  # put back, it is the old one again


@pytest.mark.parametrize("way", WAYS)
def test_mismatch_error_names_the_changed_libraries(runs, way):
    sentence = refused(runs, "transforms", way, with_views(STORED["transforms"], seed=7))
    here = library_versions()["torchvision"]
    assert f"It was made with torchvision 0.1 (here {here})." in sentence


@pytest.mark.parametrize(
    ("views", "size", "shape"),
    [
        (TENSOR, (9, 7), (3, 9, 7)),
        (with_views(TENSOR, operations=({"name": "RandomResizedCrop", "size": [5, 6]}, CROP)), (9, 7), (3, 5, 6)),
        (TRANSFORMS, (9, 7), (3, 20, 24)),
        (TRANSFORMS, None, (3, 20, 24)),
        (with_views(TRANSFORMS, operations=(FLIP,)), (9, 7), (3, 9, 7)),
    ],
)
def test_renderer_shape_equals_the_rendered_shape(views, size, shape):
    made = renderer(views, size)
    assert made.shape == shape
    assert made.identity["image_shape"] == list(shape)
    pixels = torch.full((2, 3, *(size or (50, 70))), 9, dtype=torch.uint8)
    drawn = torch.stack([made.render_image(one.numpy(), 5, 1) for one in pixels])
    assert made.render_batch(drawn, torch.tensor([5, 6]), 1).shape[1:] == shape


@pytest.mark.parametrize(
    ("operations", "size"),
    [
        ((FLIP,), None),
        (({"name": "Resize", "size": 30},), None),
        (({"name": "RandomResize", "min_size": 10, "max_size": 40},), (9, 7)),
    ],
    ids=["as they are", "the shorter side", "another size each time"],
)
def test_views_of_unequal_size_are_refused(operations, size):
    with pytest.raises(
        RecipeError, match=r"all views must have the same size: .*end the operations with a Resize or a crop"
    ):
        _ = renderer(with_views(TRANSFORMS, operations=operations), size).shape


def test_crop_larger_than_small_images_is_rejected():
    views = with_views(TRANSFORMS, operations=({"name": "RandomCrop", "size": 128},))
    with pytest.raises(RecipeError, match=r"crop size .*larger than .*tried on patterns of 64 x 64 pixels and more"):
        _ = renderer(views, None).shape
    assert renderer(views, (128, 130)).shape == (3, 128, 128)
    with pytest.raises(RecipeError, match=r"crop size .*larger than"):
        _ = renderer(views, (128, 127)).shape
    with pytest.raises(RecipeError, match=r"crop size .*larger than"):
        _ = renderer(with_views(TRANSFORMS, operations=({"name": "RandomCrop", "size": 32},)), (28, 28)).shape


def test_operations_that_do_not_fit_the_images_are_refused():
    with pytest.raises(RecipeError, match="padding = 8 could crop images of 9 x 7 to nothing"):
        _ = renderer(with_views(TENSOR, operations=({"name": "RandomCrop", "padding": 8},))).shape


def photographs(folder, **sizes):
    """An image folder: one gray image of (W, H) for each name, class `a` and its test split alike."""
    for split in ("train", "test"):
        (folder / split / "a").mkdir(parents=True)
        for name, size in sizes.items():
            Image.new("L", size, 80).save(folder / split / "a" / f"{name}.png")
    return load_dataset(DataConfig(name=f"imagefolder:{folder}", cache_bytes=0), "train")


def test_tensor_engine_rejects_images_of_different_sizes(tmp_path):
    train_set = photographs(tmp_path / "set", one=(12, 10), two=(12, 10), three=(10, 12))
    with pytest.raises(RecipeError, match=r"one\.png is 12 x 10, .*three\.png is 10 x 12: set data\.image_size"):
        _ = tiny_context(tmp_path, train_set=train_set, views=TENSOR).renderer
    assert tiny_context(tmp_path, train_set=train_set, views=TRANSFORMS).renderer.shape == (3, 20, 24)


def test_subset_of_one_size_has_the_same_views(tmp_path):
    train_set = photographs(tmp_path / "set", one=(12, 10), two=(12, 10), three=(10, 12))
    part = train_set.take(torch.tensor([0, 2]))
    assert (train_set.image_size, part.image_size) == (None, (10, 12))
    whole, other = (tiny_context(tmp_path, train_set=one, views=TRANSFORMS) for one in (train_set, part))
    assert other.view_identity() == whole.view_identity()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"transform": "python:a:b"}, "needs views.engine = 'transforms'"),
        ({"transform": "python:a:b", "engine": "transforms", "operations": (FLIP,)}, "replaces views.operations"),
        ({"mix": MIXED.mix, "replay": False}, r"\[views.mix\] needs views.replay = true"),
        ({"operations": ({"name": "RandomHorizontalFlop"},)}, "did you mean 'RandomHorizontalFlip'"),
    ],
)
def test_invalid_views_are_rejected_without_images(changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        check_views(Views(**changes))


@pytest.mark.parametrize(
    ("views", "warned"),
    [
        (with_views(TENSOR, num_views=1), "the same view of each image in every epoch"),
        (with_views(MIXED, num_views=1), "the same view of each image in every epoch"),
        (with_views(STORED["python"], num_views=1), "the same view of each image in every epoch"),
        (with_views(TENSOR, num_views=8, replay=False), "other views than those of its targets"),
        (with_views(TENSOR, num_views=2), None),
        (Views(num_views=1), None),
        (Views(num_views=1, replay=False), None),
    ],
)
def test_views_that_teach_little_are_warned_of(views, warned):
    sentence = view_warning(views)
    assert (sentence is None) == (warned is None)
    assert warned is None or (warned in sentence and "4.8 in 9,600 (Beyer et al. 2022)" in sentence)


def test_equal_views_are_warned_of():
    assert "the same outputs 4 times" in (view_warning(Views()) or "")
