"""`kdpipe views`: the images are the views, the words under them are what the store says."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.kdpipe_process import RECIPE, kdpipe_here
from support.made_store import folder_bytes
from support.tiny_run import CACHE, TEACHER, VIEWS, make_tiny_store, squares, tiny_context

from kdpipe.pipeline.commands.view_grid import draw_grid
from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.preview import ViewPreview, show_views
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.views.renderer import Renderer
from kdpipe.store import open_store

ALL = squares(120, 0)
STORED = ALL.take(torch.arange(80))
WHITE = 255


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    context = tiny_context(folder, train_set=STORED)
    make_tiny_store(context)
    top_k = dataclasses.replace(CACHE, top_k=2)
    cache_teacher(top_k, folder / "top.zarr", load_teacher(TEACHER, 0, context), [], context)
    return folder


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def test_preview_shows_views_of_stored_samples(run):
    shown = show_views(tiny_context(run, train_set=ALL), open_store(run / "store.zarr"), 5, 2)
    assert shown.images.shape == (5, 2, 1, 8, 8)
    assert set(shown.sample_ids) <= set(STORED.sample_ids.tolist())
    position = {one: at for at, one in enumerate(ALL.sample_ids.tolist())}
    for row, one in enumerate(shown.sample_ids):
        image, ids = ALL.images[position[one]][None], torch.tensor([one])
        assert shown.labels[row] == "abcd"[ALL.labels[position[one]]]
        for view in range(2):
            assert torch.equal(shown.images[row, view], Renderer(VIEWS, 1, (8, 8)).render_batch(image, ids, view)[0])


def test_preview_shows_top_classes_of_stored_logits(run):
    store = open_store(run / "store.zarr")
    shown = show_views(tiny_context(run, train_set=ALL), store, 20, 3)
    for row, one in enumerate(shown.sample_ids):
        for view in range(3):
            shares = softmax(store.gather("logits", view, np.array([one]))[0])
            best = np.argsort(-shares, kind="stable")[:3]
            assert [name for name, _ in shown.top[row][view]] == ["abcd"[at] for at in best]
            assert [share for _, share in shown.top[row][view]] == pytest.approx(shares[best].tolist(), rel=1e-5)


def test_preview_of_top_k_logits_spreads_the_rest(run):
    context = tiny_context(run, train_set=ALL)
    dense, top = (open_store(run / name) for name in ("store.zarr", "top.zarr"))
    shown = show_views(context, top, 20, 3)
    assert shown.sample_ids == show_views(context, dense, 20, 3).sample_ids
    for row, one in enumerate(shown.sample_ids):
        for view in range(3):
            shares = softmax(dense.gather("logits", view, np.array([one]))[0])
            first, second, third = shown.top[row][view]
            expected = np.sort(shares)[::-1]
            assert [first[1], second[1], 2 * third[1]] == pytest.approx([*expected[:2], expected[2:].sum()], abs=5e-3)
            assert first[0] == "abcd"[int(shares.argmax())]


def test_without_a_store_it_shows_the_recipes_views_alone(run):
    shown = show_views(tiny_context(run, train_set=ALL), None, 200, 99)
    assert shown.images.shape == (120, VIEWS.num_views, 1, 8, 8)
    assert shown.top == [[[], [], []]] * 120


def by_hand(shape, labels, top):
    images = torch.randint(0, 200, (len(labels), len(top[0]), *shape), dtype=torch.uint8)
    partners = [[None] * images.shape[1]] * len(labels)
    return ViewPreview(images, ["view 0"] * images.shape[1], list(range(len(labels))), labels, top, partners)


def drawn(shown, path):
    draw_grid(shown, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_grid_has_samples_as_rows_and_views_as_columns(tmp_path, shape):
    shown = by_hand(shape, ["cat", "dog"], [[[]] * 3] * 2)
    pixels = drawn(shown, tmp_path / "grid.png")
    assert pixels.shape == (24 + 2 * 184, 96 + 3 * 136, 3)
    enlarged = 128 // shape[1]
    for row in range(2):
        for view in range(3):
            down, right = 24 + 184 * row, 96 + 136 * view
            wanted = shown.images[row, view].expand(3, -1, -1).numpy().transpose(1, 2, 0)
            wanted = wanted.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
            assert np.array_equal(pixels[down : down + 128, right : right + 128], wanted)
            assert (pixels[down + 128 : down + 184, right : right + 136] == WHITE).all(), "no store, no words"


@pytest.mark.parametrize(
    ("size", "cell"),
    [((300, 150), (128, 64)), ((131, 400), (42, 128)), ((1, 999), (1, 128)), ((64, 48), (128, 96))],
)
def test_larger_images_fill_their_cell(tmp_path, size, cell):
    pixels = drawn(by_hand((3, *size), ["cat"], [[[]]]), tmp_path / "grid.png")
    inked = (pixels[24:, 96:] != WHITE).any(2)
    assert (int(inked.any(1).sum()), int(inked.any(0).sum())) == cell


def test_correct_predictions_are_green(tmp_path):
    words = [("cat", 0.9), ("dog", 0.07), ("cow", 0.03)]
    pixels = drawn(by_hand((1, 8, 8), ["cat", "cow"], [[words], [words[:2]]]), tmp_path / "grid.png").astype(int)

    def line(row, number):
        """(inked, green) of a line of words."""
        down = 24 + 184 * row + 128 + 12 * number
        some = pixels[down : down + 12, 96:]
        return bool((some < 128).any()), bool((some[..., 1] > some[..., 0] + 50).any())

    assert [line(0, number) for number in range(3)] == [(True, True), (True, False), (True, False)]
    assert [line(1, number) for number in range(3)] == [(True, False), (True, False), (False, False)]


def test_names_of_any_letters_and_length_are_drawn(tmp_path):
    name = "猫\n\x1b[31m" + "long " * 40
    drawn(by_hand((1, 8, 8), [name], [[[(name, 1.0)]]]), tmp_path / "grid.png")


def test_command_draws_at_every_stage_of_the_store(tmp_path):
    recipe, run, picture = tmp_path / "tiny.toml", tmp_path / "run", tmp_path / "some.png"
    recipe.write_text(RECIPE)
    small = [f"--set={change}" for change in ("data.num_train=60", "views.num_views=2", "teacher.train.epochs=1")]
    views = ("views", recipe, "--run", run, *small, "--save", picture, "--samples", 3, "--json")
    first = kdpipe_here(*views)
    assert first.exit_code == 0, first.stderr
    assert "without the teacher's predictions" in first.stderr
    assert not run.exists()
    assert kdpipe_here("train-teacher", recipe, "--run", run, *small).exit_code == 0
    assert kdpipe_here("cache-teacher", recipe, "--run", run, *small, "--part", "0/2").exit_code == 0
    before, unfinished = folder_bytes(run), kdpipe_here(*views)
    assert unfinished.exit_code == 0, unfinished.stderr
    assert folder_bytes(run) == before, "the picture is all that it writes"
    assert json.loads(unfinished.stdout)["store"] is None
    assert [sample["top"] for sample in json.loads(unfinished.stdout)["samples"]] == [[[], []]] * 3
    assert kdpipe_here("cache-teacher", recipe, "--run", run, *small).exit_code == 0
    finished = kdpipe_here(*views)
    document = json.loads(finished.stdout)
    assert "without the teacher's predictions" not in finished.stderr
    assert document["store"] == str(run / "store.zarr")
    assert [sample["id"] for sample in document["samples"]] == [
        sample["id"] for sample in json.loads(unfinished.stdout)["samples"]
    ]
    store = open_store(run / "store.zarr")
    for sample in document["samples"]:
        for view, top in enumerate(sample["top"]):
            shares = softmax(store.gather("logits", view, np.array([sample["id"]]))[0])
            assert [share for _, share in top] == pytest.approx(np.sort(shares)[::-1][:3].tolist(), rel=1e-5)
    assert Image.open(picture).size == (96 + 2 * 136, 24 + 3 * 184)
    lost = kdpipe_here(*views, "--save", tmp_path / "nowhere" / "some.png")
    assert lost.exit_code == 1
    assert f"there is no folder {tmp_path / 'nowhere'}" in lost.stderr


def test_mix_partner_is_written_below_the_image(tmp_path):
    shown = by_hand((1, 8, 8), ["cat"], [[[], []]])
    pixels = drawn(dataclasses.replace(shown, partners=[[None, ("dog", 0.3)]]), tmp_path / "grid.png")
    line = pixels[24 + 128 + 36 : 24 + 128 + 48]
    assert (line[:, 96 : 96 + 136] == WHITE).all()
    assert (line[:, 96 + 136 :] != WHITE).any()


def test_a_picture_must_be_named_a_png(tmp_path):
    with pytest.raises(RecipeError, match="use a name that ends in .png"):
        draw_grid(by_hand((1, 8, 8), ["cat"], [[[]]]), tmp_path / "grid.jpg")
