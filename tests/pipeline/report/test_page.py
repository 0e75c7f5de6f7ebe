"""The HTML page of runs: self-contained, escaped, deterministic, and complete apart from what it says is missing."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from support.kdpipe_process import RECIPE, kdpipe_here
from support.made_store import make_store

from kdpipe.pipeline.job import _print_results
from kdpipe.pipeline.report.chart import spread, thinned, with_unique_ids
from kdpipe.pipeline.report.html.heat import NUM_LEVELS, level_of
from kdpipe.pipeline.report.html.read import Job, Network
from kdpipe.pipeline.report.html.sections.curves import Curve, curve_panel
from kdpipe.pipeline.report.html.sections.losses import loss_panel
from kdpipe.pipeline.report.html.sections.reliability import pooled_bins
from kdpipe.pipeline.report.html.sections.similarity import (
    TEMPERATURE,
    Similarity,
    _neighbors,
    closest_pairs,
    similarity_of,
)
from kdpipe.pipeline.report.html.write import SECTIONS, write_page
from kdpipe.pipeline.report.report import read_report
from kdpipe.stages.errors import RunError
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.training.job_dir import write_json_file
from kdpipe.store import StoreError, open_store

VOID = {"meta", "br", "img", "hr", "input"}
HOSTILE = '<script>alert("1")</script>\u202e\x1b[2J&amp;'


class Parsed(HTMLParser):
    """A parsed page: elements closed in order, attributes, texts, headings."""

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
    """Return an evaluation as stages.examine writes it; of fifteen bins the last two are filled."""
    empty = {"num_samples": 0, "confidence": None, "accuracy": None}
    some = {"num_samples": 10, "confidence": 0.9, "accuracy": 0.5}
    kept = {
        "top1": right,
        "top5": None,
        "cross_entropy": 1.0,
        "ece": 0.125,
        "agreement": None,
        "teacher_kl": None,
        "per_class": [{"name": name, "accuracy": right, "num_samples": 1000} for name in names],
        "bins": [empty] * 13 + [some, {"num_samples": 30, "confidence": 0.97, "accuracy": 0.99}],
        "confusions": [[0, 1, 3], [1, 2, 1]],
    }
    return {name: value for name, value in (kept | more).items() if value is not ...}


def leave_job(folder, accuracy, found, losses=("hard_labels",)):
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
        json.dumps({"epoch": epoch, "accuracy": accuracy * (epoch + 1) / 3, "losses": dict.fromkeys(losses, 1.0)})
        for epoch in range(3)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def made_run(folder, name="made", seeds=(0, 1), **kept):
    """Make a run of three networks with accuracies 90 %, alone 70 and 72 %, distilled 80 and 82 %."""
    recipe = {"name": name, "student": {"seeds": list(seeds)}, "compress": {"steps": []}, "cache": {}}
    leave_job(folder / "teacher", 0.9, examined(0.9, **kept))
    for seed in seeds:
        leave_job(folder / f"students/alone-seed{seed}", 0.7 + 0.02 * seed, examined(0.7, **kept))
        leave_job(folder / f"students/distilled-seed{seed}", 0.8 + 0.02 * seed, examined(0.8, **kept))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def page_of(*runs, file=None):
    """Return the page's text, parsed, and the messages meanwhile."""
    messages, file = [], file or runs[0].parent / "page.html"
    write_page(runs, file, messages.append)
    text = file.read_text()
    return text, Parsed(text), messages


def test_page_is_one_file_and_fetches_nothing(tmp_path):
    text, read, _ = page_of(made_run(tmp_path / "run"))
    assert not read.tags & {"script", "link", "iframe", "object", "embed", "base"}
    policies = [value for tag, name, value in read.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;") for value in policies)
    for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
        assert all(value.startswith(("#", "data:image/png")) for value in read.values(name))
    assert not re.search(r"url\(|@import|https?:|//", re.sub(r"data:image/png;base64,[\w+/=]*", "", text))
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_page_has_all_sections_and_valid_links(tmp_path):
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


def test_summary_gives_gain_by_distillation(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "run"))
    sentence = (
        "Distillation helped: the student reaches 81.00 ± 1.41 % test accuracy distilled and 71.00 ± 1.41 % alone, "
        "+10.00 points (95 % interval +7.85 to +12.14 over images; 3,000 test images, 2 seeds)."
    )
    assert sentence in read.text
    assert "closes 53 % of the gap to the teacher's 90.00 %" in read.text


def test_summary_names_networks_at_chance(tmp_path):
    run = made_run(tmp_path / "run")
    assert "At chance" not in page_of(run)[1].text
    path = run / "students/alone-seed1/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at_chance": True}))
    assert "At chance, no better than guessing: student alone." in page_of(run)[1].text


def test_run_without_baseline_is_complete_and_says_so(tmp_path):
    run = made_run(tmp_path / "run")
    for folder in (run / "students").glob("alone-*"):
        shutil.rmtree(folder)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["student"]["baseline"] = False
    (run / "recipe.json").write_text(json.dumps(recipe))
    _, read, _ = page_of(run)
    assert "The distilled student reaches 81.00 ± 1.41 % test accuracy; the teacher reaches 90.00 %." in read.text
    assert "student.baseline = false" in read.text
    report = read_report(run)
    assert [row.kind for row in report.rows] == ["teacher", "student"]
    assert report.missing == []


def test_gain_within_seed_spread_closes_no_gap(tmp_path):
    run = made_run(tmp_path / "run")
    path = run / "students/distilled-seed1/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": 0.64}))
    _, read, _ = page_of(run)
    assert "Whether distillation helped is not clear" in read.text
    assert "That closes" not in read.text


def test_untrusted_names_are_escaped_everywhere(tmp_path):
    run = made_run(tmp_path / "<b>run", name=HOSTILE, names=(HOSTILE, "dog", "eel"))
    leave_job(run / "students/alone-seed2", 0.5, examined(names=(HOSTILE, "dog", "eel")), losses=(HOSTILE,))
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["student"]["seeds"].append(2)
    (run / "recipe.json").write_text(json.dumps(recipe | {HOSTILE: [HOSTILE]}))
    session = {"command": HOSTILE, "argv": [HOSTILE], "host": HOSTILE, "device": {HOSTILE: HOSTILE}}
    (run / "run.json").write_text(json.dumps({"sessions": [session, HOSTILE], HOSTILE: 1}))
    text, read, messages = page_of(run, run)
    assert "<script" not in text.lower()
    assert "<b>run" not in text
    assert not set(text) & {"\u202e", "\x1b"}
    assert '<script>alert("1")</script>??[2J&amp;' in read.text
    assert str(tmp_path) not in text + "".join(messages[:-1])


def test_untrusted_names_are_escaped_in_error_messages(tmp_path):
    run = made_run(tmp_path / "run", confusions=[[HOSTILE, 0, 1]])
    text, read, _ = page_of(run)
    assert "<script" not in text.lower()
    assert "The data of this section is damaged" in read.text


@pytest.mark.parametrize(
    "damage", [{"bins": "pie"}, {"bins": [1] * 15}, {"confusions": [[0]]}, {"confusions": [[7, 8, 1]]}]
)
def test_damaged_section_leaves_others_intact(tmp_path, damage):
    _, read, messages = page_of(made_run(tmp_path / "run", **damage))
    assert len([one for one in messages if "The data of this section is damaged" in one]) == 1
    assert "Agreement with the teacher" in read.text
    assert "student distilled ends at" in read.text


def test_missing_evaluations_are_reported(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "run", bins=..., confusions=...))
    assert "Confidences are recorded when a network is finished" in read.text
    assert "Confusions are recorded when a network is finished" in read.text
    assert "This run has no run.json" in read.text


def test_unfinished_run_has_a_page(tmp_path):
    run = made_run(tmp_path / "run")
    for path in run.glob("*/*/result.json"):
        path.unlink()
    (run / "teacher/result.json").unlink()
    _, read, _ = page_of(run)
    assert "No network of this run is finished yet." in read.text
    assert "student distilled: test accuracy by epoch" in read.text


@pytest.mark.parametrize(
    "line",
    ['{"epoch": 3, "accu', '{"epoch": 3, "accuracy": NaN}', '{"epoch": "x"}', "[]", '{"epoch": 3, "accuracy": 7}'],
)
def test_damaged_metrics_leave_out_the_curves(tmp_path, line):
    run = made_run(tmp_path / "run")
    with (run / "teacher/metrics.jsonl").open("a") as file:
        file.write("\n" + line)
    _, read, messages = page_of(run)
    assert "This could not be read: run/teacher/metrics.jsonl is damaged" in read.text
    assert len([message for message in messages if "Learning curves is left out" in message]) == 1
    assert "Agreement with the teacher" in read.text


def test_several_runs_are_compared(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "one", name="first"), made_run(tmp_path / "two", name="second"))
    assert "Comparison of runs" in read.text
    assert "+7.85 to +12.14 over images" in read.text
    assert [title for level, title in read.headings if level == 2] == ["Learning curves", "first", "second"]


def test_page_is_deterministic(tmp_path):
    run = made_run(tmp_path / "run")
    assert page_of(run, file=tmp_path / "a")[0] == page_of(run, file=tmp_path / "b")[0]


def test_tables_have_headers_and_charts_have_titles(tmp_path):
    text, _, _ = page_of(made_run(tmp_path / "run"))
    assert text.count("<table") == text.count("<caption>") > 5
    assert not re.search(r"<th(?! scope=\"(col|row)\")[ >]", text)
    assert text.count("<svg") == text.count('role="img"><title>') == text.count("</title><desc>") > 5


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        write_page([made_run(tmp_path / "run"), tmp_path], tmp_path / "page.html", str)
    assert not (tmp_path / "page.html").exists()


def test_bins_of_seeds_are_pooled_by_num_samples(tmp_path):
    empty = {"num_samples": 0, "confidence": None, "accuracy": None}
    seeds = [
        [{"num_samples": 10, "confidence": 0.2, "accuracy": 0.0}, empty],
        [{"num_samples": 30, "confidence": 0.4, "accuracy": 1.0}, empty],
    ]
    jobs = [Job(tmp_path, {"examined": {"bins": bins}}) for bins in seeds]
    first, second = pooled_bins(Network("n", "n", [*jobs, Job(tmp_path, None), Job(tmp_path, {})]))
    assert (first.num_samples, first.confidence, first.accuracy) == (40, pytest.approx(0.35), pytest.approx(0.75))
    assert (first.low, first.high, second.num_samples) == (0.0, 0.5, 0)


def test_similarity_is_mean_softened_output_by_label(tmp_path, monkeypatch):
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.BATCH_ROWS", 100)
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


def test_similarity_of_many_classes_is_that_of_the_most_frequent(tmp_path, monkeypatch):
    """Memory and time are bounded: 21,841 classes would be 4 GB a matrix."""
    store = open_store(make_store(tmp_path / "made.zarr", num_samples=250).path)
    whole = similarity_of(store, "made")
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.MAX_SHARES", 40)
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.BATCH_OUTPUTS", 30)
    found = similarity_of(store, "made")
    counts = np.bincount(store.samples.labels, minlength=10)
    assert found.classes.tolist() == sorted(sorted(range(10), key=lambda label: (-counts[label], label))[:4])
    assert np.array_equal(found.shares, whole.shares[found.classes])
    assert found.num_samples == counts[found.classes].sum()
    assert {label for pair in closest_pairs(found, 20) for label in pair} == set(found.classes.tolist())
    neighbors = _neighbors(found).rows
    assert neighbors == [row for row in _neighbors(whole).rows if row[0] in [found.names[i] for i in found.classes]]
    monkeypatch.setattr("kdpipe.pipeline.report.html.sections.similarity.MAX_OUTPUTS", 100)
    assert similarity_of(store, "made").num_samples == 10


def test_similarity_refuses_labels_outside_of_classes(tmp_path, monkeypatch):
    made = make_store(tmp_path / "made.zarr", num_samples=50)
    store = open_store(made.path)
    store.samples.labels[3] = 10
    with pytest.raises(StoreError, match="not among the teacher's classes"):
        similarity_of(store, "made")


def test_closest_pairs_skip_classes_without_images():
    shares = np.full((5, 5), 0.001)
    shares[0, 2] = shares[3, 1] = 0.2
    shares[4] = np.nan
    found = Similarity(tuple("abcde"), np.arange(5), shares, 1, "made")
    assert list(closest_pairs(found, 2)) == [(0, 2), (1, 3)]
    assert len(list(closest_pairs(found, 20))) == 6


def test_heat_map_levels():
    levels = level_of(np.array([[0.0, 1.0], [0.25, np.nan]]), (0.0, 1.0))
    assert levels.tolist() == [[0, NUM_LEVELS - 1], [NUM_LEVELS // 2, -1]]
    assert level_of(np.zeros((1, 1)), (0.0, 0.0)).tolist() == [[0]]


@pytest.mark.parametrize("accuracies", [[0.0], [100.0], [0.0, 100.0], [97.1, 97.2], [99.999, 100.0], [1.0, 1.0]])
def test_curves_of_extreme_accuracies_are_drawn(accuracies):
    by_epoch = dict(enumerate(accuracies, 1))
    curve = Curve("network", "student", "solid", [by_epoch])
    drawn = curve_panel("title", [curve], [curve])
    assert f">{accuracies[-1]:.2f}</text>" in drawn
    assert not re.search("nan|inf", drawn)
    ticks = re.findall(r">(\d+(?:\.\d+)?)</text>", drawn)
    assert len(set(ticks)) >= 3


@pytest.mark.parametrize("values", [[0.0], [-2.0, 1.0], [3.0], [1e-300, 1e9], [1e-9, 1e-8]])
def test_extreme_losses_are_drawn(values):
    drawn = loss_panel("network", {"kd": dict(enumerate(values, 1)), "hard_labels": {1: values[0]}})
    assert "<title>network: losses by epoch</title><desc>kd, hard_labels</desc>" in drawn
    assert not re.search("nan|inf", drawn)


def test_losses_are_means_over_seeds_by_term(tmp_path):
    run = made_run(tmp_path / "run")
    seeds = ([{"kd": 0.5, "hard_labels": 2.0}, {"kd": 0.25}], [{"kd": 1.0, "hard_labels": math.nan}])
    for seed, epochs in enumerate(seeds):
        lines = [json.dumps({"epoch": number, "accuracy": 0.5, "losses": terms}) for number, terms in enumerate(epochs)]
        (run / f"students/distilled-seed{seed}/metrics.jsonl").write_text("\n".join(lines))
    text, read, _ = page_of(run)
    assert "student distilled: losses by epoch epoch kd hard_labels 1 0.75 2 2 0.25 - " in read.text
    for name in ("teacher", "student alone", "student distilled"):
        assert f"<title>{name}: losses by epoch</title>" in text


def test_run_without_losses_leaves_out_their_charts(tmp_path):
    run = made_run(tmp_path / "run")
    for path in run.rglob("metrics.jsonl"):
        path.write_text('{"epoch": 0, "accuracy": 0.5}')
    _, read, _ = page_of(run)
    assert "No loss is recorded in this run yet." in read.text
    assert "student distilled ends at 50.00" in read.text


def test_long_curves_are_thinned_to_their_last_point():
    epochs, values = thinned({epoch: float(epoch) for epoch in range(1, 1001)}, 300)
    assert len(epochs) <= 300
    assert epochs[-1] == values[-1] == 1000
    assert thinned({}) == ([], [])


def test_ids_in_charts_are_unique_and_references_follow():
    chart = '<svg class="chart"><path id="a"/><use href="#a"/></svg>'
    text = with_unique_ids(f'<p id="a">{chart}{chart}</p>')
    assert re.findall('id="([^"]*)"', text) == ["a", "c0-a", "c1-a"]
    assert re.findall('href="#([^"]*)"', text) == ["c0-a", "c1-a"]


def test_charts_do_not_depend_on_the_users_settings(tmp_path):
    run, imported = made_run(tmp_path / "run"), set(sys.modules)
    before = page_of(run, file=tmp_path / "a")[0]
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page_of(run, file=tmp_path / "b")[0] == before
    assert "matplotlib.pyplot" not in set(sys.modules) - imported  # torchmetrics may have imported it before


def test_chart_colors_follow_the_page(tmp_path):
    text, _, _ = page_of(made_run(tmp_path / "run"))
    colors = re.findall('(?:fill|stroke): ([^;"]+)', "".join(re.findall('<svg class="chart".*?</svg>', text, re.S)))
    assert {one for one in colors if not one.startswith("var(--")} <= {"none"}
    assert "prefers-color-scheme: dark" in text


def test_page_is_written_where_home_is_not_writable(tmp_path):
    run = made_run(tmp_path / "run")
    script = "import sys; from pathlib import Path; from kdpipe.pipeline.report.html.write import write_page; "
    script += "write_page([Path(sys.argv[1])], Path(sys.argv[2]), str)"
    hidden = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": "/proc/1/nowhere", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(run), str(tmp_path / "page.html")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "page.html").exists()


def test_labels_are_spread_apart_within_the_frame():
    assert spread([10, 50, 12], 10, 100) == [10, 50, 20]
    assert sorted(spread([98, 99, 97], 10, 100)) == [80, 90, 100]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Train a real run of a few seconds, without compression."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(RECIPE)
    short = ("teacher.train.epochs=2", "student.train.epochs=1", "views.num_views=2")
    overrides = [part for one in short for part in ("--set", one)]
    for command in ("train-teacher", "cache-teacher", "train-student"):
        ended = kdpipe_here(command, folder / "tiny.toml", *overrides, "--run", folder / "run")
        assert ended.exit_code == 0, ended.output
    return folder / "run"


def test_real_run_has_similarity_and_samples(whole_run):
    text, read, messages = page_of(whole_run)
    assert len(messages) == 1  # nothing is left out
    assert "The most similar pairs" in read.text
    images = read.values("src")
    assert 4 <= len(images) <= 12
    assert read.text.count("teacher ") > len(images)
    assert "Selected from the first 359 test images." in read.text
    assert page_of(whole_run, file=whole_run / "again.html")[0] == text


def test_demo_ends_with_the_page(whole_run, capsys):
    page = whole_run / "report.html"
    _print_results("run", SimpleNamespace(folder=whole_run), {}, as_json=False, page=True)
    assert f"page     {page}" in capsys.readouterr().out
    assert page.read_text() == page_of(whole_run, file=whole_run / "again.html")[0]


def test_networks_of_users_are_shown_from_their_onnx_files(whole_run, tmp_path):
    """Their code is not imported."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    _, before, _ = page_of(whole_run)
    for kind in ("alone", "distilled"):
        path = run / "students" / f"{kind}-seed0" / "model.safetensors"
        tensors, record = load_tensors(path)
        record["architecture"] |= {"model": "python:gone:factory", "source_sha256": "a" * 64}
        save_tensors(path, tensors, record)
    _, read, messages = page_of(run)
    assert len(messages) == 1  # nothing is left out
    assert read.values("src") == before.values("src")


def test_missing_data_leaves_out_only_the_samples(whole_run, tmp_path):
    (tmp_path / "run").symlink_to(whole_run)
    recipe = whole_run / "recipe.json"
    kept = recipe.read_text()
    changed = json.loads(kept)
    try:
        for name, why in (("npz:gone", "The images could not be shown"), ("python:os:system", "from a Python module")):
            changed["data"]["name"] = name
            write_json_file(recipe, changed)
            _, read, messages = page_of(tmp_path / "run")
            assert why in read.text
            assert "The most similar pairs" in read.text
            assert len(messages) == 2
    finally:
        write_json_file(recipe, json.loads(kept))
