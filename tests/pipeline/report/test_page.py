"""The HTML page of runs: it stands alone, escapes what strangers named, shows what there is, and says what is not."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from kdpipe_process import RECIPE, kdpipe_here
from made_store import make_store

from pipeline.page.chart import error_axis, spread
from pipeline.page.heat import NUM_LEVELS, level_of
from pipeline.page.read import Job, Network
from pipeline.page.reliability import pooled_bins
from pipeline.page.similarity import TEMPERATURE, Similarity, by_likeness, closest_pairs, similarity_of
from pipeline.page.write import SECTIONS, write_page
from stages.errors import RunError
from store import StoreError, open_store

VOID = {"meta", "br", "img", "hr", "input"}
HOSTILE = '<script>alert("1")</script>\u202e\x1b[2J&amp;'


class Read(HTMLParser):
    """A page as it is read: every element closed in its order, all attributes, the texts, and ids and links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.headings, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *one) for one in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *one) for one in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def examined(right=0.8, names=("cat", "dog", "eel"), **more):
    """As stages.examine leaves it; of fifteen bins the last two are filled."""
    empty = {"num_samples": 0, "confidence": None, "accuracy": None}
    some = {"num_samples": 10, "confidence": 0.9, "accuracy": 0.5}
    kept = {
        "top1": right,
        "top5": None,
        "cross_entropy": 1.0,
        "ece": 0.125,
        "agreement": None,
        "teacher_kl": None,
        "per_class": [{"name": name, "accuracy": right, "num_samples": 10} for name in names],
        "bins": [empty] * 13 + [some, {"num_samples": 30, "confidence": 0.97, "accuracy": 0.99}],
        "confusions": [[0, 1, 3], [1, 2, 1]],
    }
    return {name: value for name, value in (kept | more).items() if value is not ...}


def leave_job(folder, accuracy, found, losses=("hard_labels",), more_lines=()):
    folder.mkdir(parents=True)
    result = {
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "num_parameters": 10,
        "onnx_bytes": 2048,
        "onnx_agreement": 1.0,
        "identity": {"weights_sha256": "ab" * 32},
        "wall_s": 1.0,
    }
    if found is not None:
        result["examined"] = found
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        json.dumps({"epoch": at, "accuracy": accuracy * (at + 1) / 3, "losses": dict.fromkeys(losses, 1 / (at + 1))})
        for at in range(3)
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, *more_lines]))


def made_run(folder, name="made", seeds=(0, 1), **kept):
    """A run of three networks: 90 % right, alone 70 and 72 %, distilled 80 and 82 %."""
    recipe = {"name": name, "student": {"seeds": list(seeds)}, "compress": {"steps": []}, "cache": {}}
    leave_job(folder / "teacher", 0.9, examined(0.9, **kept))
    for seed in seeds:
        leave_job(folder / f"students/alone-seed{seed}", 0.7 + 0.02 * seed, examined(0.7, **kept))
        leave_job(folder / f"students/distilled-seed{seed}", 0.8 + 0.02 * seed, examined(0.8, **kept))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def page_of(*runs, file=None):
    """The page's text, read, and what was said meanwhile."""
    said, file = [], file or runs[0].parent / "page.html"
    write_page(runs, file, said.append)
    text = file.read_text()
    return text, Read(text), said


def test_a_page_stands_alone_and_fetches_nothing(tmp_path):
    text, read, _ = page_of(made_run(tmp_path / "run"))
    assert not read.tags & {"script", "link", "iframe", "object", "embed", "base"}
    policies = [value for tag, name, value in read.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;") for value in policies)
    for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
        assert all(value.startswith(("#", "data:image/png")) for value in read.values(name))
    assert not re.search(r"url\(|@import|https?:|//", re.sub(r"data:image/png;base64,[\w+/=]*", "", text))
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_every_section_has_a_heading_and_every_link_leads_somewhere(tmp_path):
    for runs in ([made_run(tmp_path / "one")], [made_run(tmp_path / "two"), made_run(tmp_path / "three")]):
        _, read, _ = page_of(*runs)
        titles = [title for _, title in read.headings]
        assert all(titles.count(section.title) >= len(runs) for section in SECTIONS)
        levels = [level for level, _ in read.headings]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        ids = read.values("id")
        assert len(set(ids)) == len(ids)
        assert {value[1:] for value in read.values("href")} <= set(ids)


def test_the_first_sentence_says_what_distillation_was_worth(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "run"))
    sentence = (
        "the student gets 81.00 ± 1.41 % of the test images right: 10.00 ± 0.00 points more than the same student"
    )
    assert sentence in read.text
    assert "closes 53 % of the gap to the teacher's 90.00 %" in read.text


def test_a_gain_within_the_spread_of_the_seeds_closes_no_gap(tmp_path):
    run = made_run(tmp_path / "run")
    path = run / "students/distilled-seed1/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": 0.64}))
    _, read, _ = page_of(run)
    assert "within the spread between seeds" in read.text
    assert "That closes" not in read.text


def test_what_strangers_named_is_text_and_commands_nothing(tmp_path):
    run = made_run(tmp_path / "<b>run", name=HOSTILE, names=(HOSTILE, "dog", "eel"))
    leave_job(run / "students/alone-seed2", 0.5, examined(names=(HOSTILE, "dog", "eel")), losses=(HOSTILE,))
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["student"]["seeds"].append(2)
    (run / "recipe.json").write_text(json.dumps(recipe | {HOSTILE: [HOSTILE]}))
    session = {"command": HOSTILE, "argv": [HOSTILE], "host": HOSTILE, "device": {HOSTILE: HOSTILE}}
    (run / "run.json").write_text(json.dumps({"sessions": [session, HOSTILE], HOSTILE: 1}))
    text, read, said = page_of(run, run)
    assert "<script" not in text.lower()
    assert "<b>run" not in text
    assert not set(text) & {"\u202e", "\x1b"}
    assert '<script>alert("1")</script>??[2J&amp;' in read.text
    assert str(tmp_path) not in text + "".join(said[:-1])


def test_names_are_escaped_in_what_is_shown_in_place_of_a_section(tmp_path):
    run = made_run(tmp_path / "run", confusions=[[HOSTILE, 0, 1]])
    text, read, _ = page_of(run)
    assert "<script" not in text.lower()
    assert "What this needs is damaged" in read.text


@pytest.mark.parametrize(
    "damage", [{"bins": "pie"}, {"bins": [1] * 15}, {"confusions": [[0]]}, {"confusions": [[7, 8, 1]]}]
)
def test_a_section_whose_figures_are_damaged_takes_no_other_along(tmp_path, damage):
    _, read, said = page_of(made_run(tmp_path / "run", **damage))
    assert len([one for one in said if "What this needs is damaged" in one]) == 1
    assert "What each network is worth" in read.text
    assert "student distilled ends at" in read.text


def test_a_run_of_an_older_kdpipe_has_a_page_that_says_what_was_not_kept(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "run", bins=..., confusions=...))
    assert "How sure the networks are was not kept" in read.text
    assert "Which classes are confused was not kept" in read.text
    assert "Which commands made this run, where and when, was not kept" in read.text


def test_a_run_under_way_has_a_page(tmp_path):
    run = made_run(tmp_path / "run")
    for path in run.glob("*/*/result.json"):
        path.unlink()
    (run / "teacher/result.json").unlink()
    _, read, _ = page_of(run)
    assert "Nothing of this run is finished yet." in read.text
    assert "student distilled: test accuracy by epoch" in read.text


def test_damaged_lines_of_metrics_are_left_out_and_told(tmp_path):
    run = made_run(tmp_path / "run")
    broken = [
        '{"epoch": 3, "accu',
        '{"epoch": 3, "accuracy": NaN}',
        '{"epoch": "x"}',
        "[]",
        '{"epoch": 3, "accuracy": 7}',
    ]
    with (run / "teacher/metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(broken))
    _, read, _ = page_of(run)
    assert "Lines of metrics.jsonl that cannot be read are left out: 5 of teacher." in read.text


def test_several_runs_stand_in_one_table_and_each_has_its_part(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "one", name="first"), made_run(tmp_path / "two", name="second"))
    assert "The runs side by side" in read.text
    assert "10.00 ± 0.00" in read.text
    assert [title for level, title in read.headings if level == 2] == ["Learning curves", "first", "second"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = made_run(tmp_path / "run")
    assert page_of(run, file=tmp_path / "a")[0] == page_of(run, file=tmp_path / "b")[0]


def test_every_table_has_headers_and_every_picture_a_name(tmp_path):
    text, _, _ = page_of(made_run(tmp_path / "run"))
    assert text.count("<table") == text.count("<caption>") > 5
    assert not re.search(r"<th(?! scope=\"(col|row)\")[ >]", text)
    assert text.count('role="img"') == text.count('role="img"><title>') > 5


def test_what_is_no_run_folder_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        write_page([made_run(tmp_path / "run"), tmp_path], tmp_path / "page.html", str)
    assert not (tmp_path / "page.html").exists()


def test_bins_of_several_seeds_are_pooled_by_their_samples(tmp_path):
    empty = {"num_samples": 0, "confidence": None, "accuracy": None}
    seeds = [
        [{"num_samples": 10, "confidence": 0.2, "accuracy": 0.0}, empty],
        [{"num_samples": 30, "confidence": 0.4, "accuracy": 1.0}, empty],
    ]
    jobs = [Job(tmp_path, {"examined": {"bins": bins}}, [], 0) for bins in seeds]
    first, second = pooled_bins(Network("n", "n", [*jobs, Job(tmp_path, None, [], 0), Job(tmp_path, {}, [], 0)]))
    assert (first.num_samples, first.confidence, first.accuracy) == (40, pytest.approx(0.35), pytest.approx(0.75))
    assert (first.low, first.high, second.num_samples) == (0.0, 0.5, 0)


def test_similarity_is_the_mean_softened_answer_by_label(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.page.similarity.BATCH_ROWS", 100)
    made = make_store(tmp_path / "made.zarr", num_samples=250)
    found = similarity_of(open_store(made.path), "made")
    logits = made.contents["logits"][0].astype(float)
    for label in range(10):
        rows = logits[made.samples.labels == label]
        each = [[math.exp(one / TEMPERATURE) for one in row] for row in rows]
        expected = np.mean([np.array(row) / sum(row) for row in each], axis=0)
        assert found.shares[label] == pytest.approx(expected)
    assert found.num_samples == 250
    assert np.isnan(np.diagonal(found.others)).all()


def test_labels_that_are_no_classes_of_the_teachers_have_no_similarity(tmp_path, monkeypatch):
    made = make_store(tmp_path / "made.zarr", num_samples=50)
    store = open_store(made.path)
    store.samples.labels[3] = 10
    with pytest.raises(StoreError, match="no classes of the teacher's"):
        similarity_of(store, "made")


def test_similar_classes_come_to_stand_side_by_side():
    """Even classes are like even ones; class 4 has no images, and the last is like none."""
    shares = np.full((8, 8), 0.001)
    for one in range(7):
        shares[one, one % 2 : 7 : 2] = 0.2
    shares[4] = np.nan
    found = Similarity(tuple("abcdefgh"), shares, 1, "made")
    order = by_likeness(found, 100).tolist()
    assert sorted(order) == [0, 1, 2, 3, 5, 6, 7]
    evens = sorted(order.index(one) for one in (0, 2, 6))
    assert evens[2] - evens[0] == 2
    assert 7 not in by_likeness(found, 6).tolist()
    assert list(closest_pairs(found, 2)) == [(0, 2), (0, 6)]


def test_a_colour_is_for_each_value_and_none_for_what_is_not_known():
    levels = level_of(np.array([[0.0, 1.0], [0.25, np.nan]]), (0.0, 1.0))
    assert levels.tolist() == [[0, NUM_LEVELS - 1], [NUM_LEVELS // 2, -1]]
    assert level_of(np.zeros((1, 1)), (0.0, 0.0)).tolist() == [[0]]


@pytest.mark.parametrize("accuracies", [[0.0], [100.0], [0.0, 100.0], [97.1, 97.2], [99.999, 100.0], [1.0, 1.0]])
def test_an_axis_of_accuracies_has_room_for_all_of_them_in_order(accuracies):
    axis = error_axis(accuracies, 200, 20)
    places = [axis.place(one) for one in accuracies]
    assert all(19.99 <= place <= 200.01 for place in places)
    assert places == sorted(places, reverse=True)
    assert len(set(places)) == len(set(accuracies))
    assert all(19.99 <= axis.place(tick) <= 200.01 for tick in axis.ticks())


def test_labels_that_would_meet_move_apart_and_stay_in_the_frame():
    assert spread([10, 50, 12], 10, 100) == [10, 50, 20]
    assert sorted(spread([98, 99, 97], 10, 100)) == [80, 90, 100]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A real run of a few seconds, without compression."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(RECIPE)
    short = ("teacher.train.epochs=2", "student.train.epochs=1", "views.num_views=2")
    overrides = [part for one in short for part in ("--set", one)]
    for command in ("train-teacher", "cache-teacher", "train-student"):
        ended = kdpipe_here(command, folder / "tiny.toml", *overrides, "--run", folder / "run")
        assert ended.exit_code == 0, ended.output
    return folder / "run"


def test_a_real_run_shows_what_the_teacher_finds_similar_and_pictures_with_opinions(whole_run):
    text, read, said = page_of(whole_run)
    assert len(said) == 1  # nothing is left out
    assert "The most similar pairs" in read.text
    pictures = read.values("src")
    assert 12 <= len(pictures) <= 24
    assert read.text.count("teacher ") > len(pictures)
    assert "Below: some of the first 359 test images." in read.text
    assert page_of(whole_run, file=whole_run / "again.html")[0] == text


def test_data_that_is_gone_leaves_out_the_pictures_alone(whole_run, tmp_path):
    (tmp_path / "run").symlink_to(whole_run)
    recipe = whole_run / "recipe.json"
    kept = recipe.read_text()
    changed = json.loads(kept)
    try:
        for name, why in (("npz:gone", "The pictures could not be shown"), ("python:os:system", "a module of Python")):
            changed["data"]["name"] = name
            recipe.write_text(json.dumps(changed))
            _, read, said = page_of(tmp_path / "run")
            assert why in read.text
            assert "The most similar pairs" in read.text
            assert len(said) == 2
    finally:
        recipe.write_text(kept)
