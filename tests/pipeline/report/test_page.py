"""The HTML page of runs: self-contained, escaped, deterministic, and complete apart from what it says is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from PIL import Image
from support.kdpipe_process import RECIPE, kdpipe_here
from support.report_page import examined, leave_job, made_run, page_of

from kdpipe.pipeline.job import _print_results
from kdpipe.pipeline.report.chart import spread, with_unique_ids
from kdpipe.pipeline.report.formatting import interval_text
from kdpipe.pipeline.report.html import write
from kdpipe.pipeline.report.html.write import SECTIONS, write_page
from kdpipe.pipeline.report.report import read_report
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.errors import RunError
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.training.job_dir import write_json_file

HOSTILE = '<script>alert("1")</script>\u202e\x1b[2J&amp;'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a run; read-only."""
    return made_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def page(made):
    """Return its page with charts."""
    return page_of(made)


def test_page_is_one_file_and_fetches_nothing(page):
    text, read, _ = page
    assert not read.tags & {"script", "link", "iframe", "object", "embed", "base"}
    policies = [value for tag, name, value in read.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;") for value in policies)
    for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
        assert all(value.startswith(("#", "data:image/png")) for value in read.values(name))
    assert not re.search(r"url\(|@import|https?:|//", re.sub(r"data:image/png;base64,[\w+/=]*", "", text))
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_page_has_all_sections_and_valid_links(tmp_path, made, page):
    for num_runs, (_, read, _) in ((1, page), (2, page_of(made, made, file=tmp_path / "two.html"))):
        titles = [title for _, title in read.headings]
        shown = [section for section in SECTIONS if section.key not in ("variants", "search", "labels")]
        assert all(titles.count(section.title) >= num_runs for section in shown)
        assert not {"Variants and settings", "Course of the search", "Average precision of each label"} & set(titles)
        levels = [level for level, _ in read.headings]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        ids = read.values("id")
        assert len(set(ids)) == len(ids)
        assert {value[1:] for value in read.values("href")} <= set(ids)


def test_summary_gives_gain_by_distillation(page):
    _, read, _ = page
    sentence = (
        "Distillation helped: the student reaches 81.00 ± 1.41 % test accuracy distilled and 71.00 ± 1.41 % alone, "
        "+10.00 points (95 % interval +7.85 to +12.14 over images; 3,000 test images, 2 seeds)."
    )
    assert sentence in read.text
    assert "closes 53 % of the gap to the teacher's 90.00 %" in read.text


@pytest.mark.usefixtures("without_charts")
def test_summary_names_networks_at_chance(tmp_path, page):
    run = made_run(tmp_path / "run")
    assert "At chance" not in page[1].text
    path = run / "students/alone-seed1/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at_chance": True}))
    assert "At chance, no better than guessing: student alone." in page_of(run)[1].text


@pytest.mark.usefixtures("without_charts")
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


@pytest.mark.usefixtures("without_charts")
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


@pytest.mark.usefixtures("without_charts")
def test_untrusted_names_are_escaped_in_error_messages(tmp_path):
    run = made_run(tmp_path / "run", confusions=[[HOSTILE, 0, 1]])
    text, read, _ = page_of(run)
    assert "<script" not in text.lower()
    assert "The data of this section is damaged" in read.text


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(
    "damage", [{"bins": "pie"}, {"bins": [1] * 15}, {"confusions": [[0]]}, {"confusions": [[7, 8, 1]]}]
)
def test_damaged_section_leaves_others_intact(tmp_path, damage):
    _, read, messages = page_of(made_run(tmp_path / "run", **damage))
    assert len([one for one in messages if "The data of this section is damaged" in one]) == 1
    assert "Agreement with the teacher" in read.text
    assert "student distilled ends at" in read.text


@pytest.mark.usefixtures("without_charts")
def test_missing_evaluations_are_reported(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "run", bins=..., confusions=...))
    assert "Confidences are recorded when a network is finished" in read.text
    assert "Confusions are recorded when a network is finished" in read.text
    assert "This run has no run.json" in read.text


@pytest.mark.usefixtures("without_charts")
def test_unfinished_run_has_a_page(tmp_path):
    run = made_run(tmp_path / "run")
    for path in run.glob("*/*/result.json"):
        path.unlink()
    (run / "teacher/result.json").unlink()
    _, read, _ = page_of(run)
    assert "No network of this run is finished yet." in read.text
    assert "student distilled: test accuracy by epoch" in read.text


@pytest.mark.usefixtures("without_charts")
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


def numbers(text):
    return [float(one.replace(",", "")) for one in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", text)]


def test_numbers_on_the_page_are_those_of_the_json(made, page):
    report = json.loads(json.dumps(read_report(made).to_json()))
    _, read, _ = page
    assert report["verdict"]["sentence"] in read.text
    rows = read.table("Results")
    assert len(rows) == len(report["rows"]) == 3
    for shown, row in zip(rows, report["rows"], strict=True):
        known = [row["accuracy_mean"], *([] if row["accuracy_std"] is None else [row["accuracy_std"]])]
        assert shown["network"] == row["name"]
        assert numbers(shown["test accuracy %"]) == [round(one, 2) for one in known]
        assert numbers(shown["95 % interval"]) == [round(row["interval"][end], 2) for end in ("low", "high")]
        assert numbers(shown["parameters"]) == [row["num_parameters"]]
        assert numbers(shown["ONNX file"]) == [round(row["file_bytes"] / 1024, 1)]
        assert f"{row['accuracy_mean']:.2f} %" in read.text
    rows = read.table("Differences of test accuracy")
    assert len(rows) == len(report["differences"])
    for shown, one in zip(rows, report["differences"], strict=True):
        assert numbers(shown["points"]) == [round(one["points"], 2)]
        assert numbers(shown["95 % interval"]) == [round(one["interval"][end], 2) for end in ("low", "high")]


@pytest.mark.usefixtures("without_charts")
def test_top_has_data_networks_losses_and_what_to_ship(tmp_path):
    run = made_run(tmp_path / "run")
    (run / "teacher/job.json").write_text(json.dumps({"data": {"num_samples": 1437}}))
    (run / "students/distilled-seed0/model.onnx").write_bytes(b"")
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps(recipe | {"data": {**recipe["data"], "labels": 40}}))
    _, read, _ = page_of(run)
    assert "Labeled training images: 40 of 1,437." in read.text
    assert "data digits, 1,437 training images (40 labeled), 3,000 test images, 3 classes" in read.text
    assert "teacher cnn (width 24), 10 parameters student cnn (width 6), 10 parameters" in read.text
    assert "views 4 of each image: RandomCrop" in read.text
    assert "loss 0.1 × hard labels + 0.9 × kd (temperature 4) + 1 × hint (layers a/b)" in read.text
    interval = interval_text(read_report(run).row("student").interval)
    assert f"to ship student distilled (81.00 ± 1.41 % test accuracy; 95 % interval {interval}; 2.0 KiB)" in read.text
    assert "run/students/distilled-seed0/model.onnx" in read.text
    assert "InferenceSession(" in read.code[0]
    artifacts = run / "compressed/artifacts-seed0"
    artifacts.mkdir(parents=True)
    write_json_file(artifacts / "card.json", {"ranking": ["teacher"], "reason": "it is small"})
    read = page_of(run)[1]
    assert "run/compressed/artifacts-seed0/teacher/model.onnx why it is small" in read.text


def test_tables_have_headers_and_charts_have_titles(page):
    text, _, _ = page
    assert text.count("<table") == text.count("<caption>") > 5
    assert not re.search(r"<th(?! scope=\"(col|row)\")[ >]", text)
    assert text.count("<svg") == text.count('role="img"><title>') == text.count("</title><desc>") > 5


@pytest.mark.usefixtures("without_charts")
def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        write_page([made_run(tmp_path / "run"), tmp_path], tmp_path / "page.html", str)
    assert not (tmp_path / "page.html").exists()


def test_ids_in_charts_are_unique_and_references_follow():
    chart = '<svg class="chart"><path id="a"/><use href="#a"/></svg>'
    text = with_unique_ids(f'<p id="a">{chart}{chart}</p>')
    assert re.findall('id="([^"]*)"', text) == ["a", "c0-a", "c1-a"]
    assert re.findall('href="#([^"]*)"', text) == ["c0-a", "c1-a"]


def test_page_is_deterministic_whatever_the_users_settings(tmp_path, made, page):
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page_of(made, file=tmp_path / "again.html")[0] == page[0]


def test_chart_colors_follow_the_page(page):
    text, _, _ = page
    colors = re.findall('(?:fill|stroke): ([^;"]+)', "".join(re.findall('<svg class="chart".*?</svg>', text, re.S)))
    assert {one for one in colors if not one.startswith("var(--")} <= {"none"}
    assert "prefers-color-scheme: dark" in text


def test_page_is_written_where_home_is_not_writable(tmp_path, made):
    script = "import sys; from pathlib import Path; from kdpipe.pipeline.report.html.write import write_page; "
    script += "write_page([Path(sys.argv[1])], Path(sys.argv[2]), str); assert 'matplotlib.pyplot' not in sys.modules"
    hidden = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": "/proc/1/nowhere", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(made), str(tmp_path / "page.html")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "page.html").exists()


def test_labels_are_spread_apart_within_the_frame():
    assert spread([10, 50, 12], 10, 100) == [10, 50, 20]
    assert sorted(spread([98, 99, 97], 10, 100)) == [80, 90, 100]


def test_a_page_of_many_runs_has_details_of_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_DETAILED", 2)
    _, read, messages = page_of(*(made_run(tmp_path / f"run{number}", f"made{number}") for number in range(4)))
    assert [row["folder"] for row in read.table("Comparison of runs")] == ["run0", "run1", "run2", "run3"]
    assert "Keys, curves and parts are those of the first 2 of these 4 runs" in read.text
    assert "run folder run1" in read.text
    assert "run folder run2" not in read.text
    assert messages[0] == "the page has all 4 runs in a table, and details of the first 2 only."


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
    assert len(text.encode()) < 1_000_000


@pytest.mark.usefixtures("without_charts")
def test_a_run_ends_with_the_page(whole_run, capsys):
    page = whole_run / "report.html"
    _print_results("run", SimpleNamespace(folder=whole_run), {}, as_json=False)
    assert f"page     {page}" in capsys.readouterr().out
    assert page.read_text() == page_of(whole_run, file=whole_run / "again.html")[0]
    page.unlink()
    page.mkdir()
    _print_results("run", SimpleNamespace(folder=whole_run), {}, as_json=False)
    printed = capsys.readouterr()
    assert "the page was not written" in printed.err
    assert f"page     kdpipe report {whole_run}" in printed.out
    page.rmdir()


@pytest.mark.usefixtures("without_charts")
def test_networks_of_users_are_shown_from_their_onnx_files(whole_run, tmp_path):
    """Their code is not imported."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    _, before, _ = page_of(whole_run)
    recipe = json.loads((run / "recipe.json").read_text())
    for network in ("teacher", "student"):
        recipe[network]["model"]["name"] = "python:gone:factory"
    write_json_file(run / "recipe.json", recipe)
    for kind in ("alone", "distilled"):
        path = run / "students" / f"{kind}-seed0" / "model.safetensors"
        tensors, record = load_tensors(path)
        record["architecture"] |= {"model": "python:gone:factory", "source_sha256": "a" * 64}
        save_tensors(path, tensors, record)
    _, read, messages = page_of(run)
    assert len(messages) == 1  # nothing is left out
    assert read.values("src") == before.values("src")
    (run / "students/alone-seed0/model.onnx").unlink()
    _, read, messages = page_of(run)
    assert len(messages) == 1
    assert "student alone is not shown: there is no ONNX file" in read.text
    assert re.search("student distilled [✓✗]", read.text)


@pytest.mark.usefixtures("without_charts")
def test_code_on_the_page_runs_the_network(whole_run, tmp_path, monkeypatch, capsys):
    code = page_of(whole_run)[1].code[0]
    test_set = load_dataset(DataConfig(name="digits"), "test")
    network = rebuild(whole_run / "students/distilled-seed0/model.safetensors")
    (tmp_path / "run").symlink_to(whole_run)
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        pixels = test_set.read(number)[0]
        Image.fromarray(pixels).save("image.png")
        exec(code, {})
        expected = network.model(network.normalize(torch.from_numpy(pixels)[None, None])).argmax()
        assert capsys.readouterr().out.strip() == test_set.class_names[int(expected)]


@pytest.mark.usefixtures("without_charts")
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
