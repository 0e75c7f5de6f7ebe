"""Several runs, and the variants and settings of one run."""

import json
import re
from itertools import pairwise

from support.kdpipe_process import kdpipe_here
from support.report_page import made_run, page_of

from kdpipe.pipeline.report.html.sections.compare import LOOKS
from kdpipe.pipeline.report.html.sections.curves import Curve, curve_panel
from kdpipe.stages.training.job_dir import write_json_file


def test_several_runs_are_compared(tmp_path):
    _, read, _ = page_of(made_run(tmp_path / "one", name="first"), made_run(tmp_path / "two", name="second"))
    assert "Comparison of runs" in read.text
    assert "+7.85 to +12.14 over images" in read.text
    assert [title for level, title in read.headings if level == 2] == ["Learning curves", "first", "second"]


def test_several_runs_show_differing_keys_and_overlaid_curves(tmp_path):
    runs = [made_run(tmp_path / name, name=name) for name in ("one", "two")]
    recipe = json.loads((runs[1] / "recipe.json").read_text())
    recipe["distill"][0]["temperature"] = 2.0
    del recipe["student"]["hard_label_weight"]
    (runs[1] / "recipe.json").write_text(json.dumps(recipe))
    text, read, _ = page_of(*runs)
    assert read.table("Recipe keys that differ") == [
        {"key": "student.hard_label_weight", "one (one)": "0.1", "two (two)": "-"},
        {"key": "distill.0.temperature", "one (one)": "4.0", "two (two)": "2.0"},
    ]
    for network in ("teacher", "student alone", "student distilled"):
        title = f"<title>{network}: test accuracy by epoch</title>"
        together = next(chart for chart in re.findall(f"{title}.*?</svg>", text, re.S))
        assert "one (one) ends at" in together and "two (two) ends at" in together
        assert {f"var(--{look[0]})" for look in LOOKS[:2]} <= set(re.findall(r"stroke: (var\(--\w+\))", together))
    assert "The recipes of these runs are the same." in page_of(runs[0], runs[0])[1].text


def test_many_runs_have_curves_of_their_own_look_and_labels_apart():
    assert len(set(LOOKS)) == len(LOOKS) >= 15
    curves = [Curve(str(number), *LOOKS[number], [{1: 50.0, 2: 90.0}]) for number in range(8)]
    drawn = curve_panel("title", curves, curves)
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>90.00<', drawn))
    assert len(heights) == 8 and all(after - before > 12 for before, after in pairwise(heights))
    assert ">90.00<" not in curve_panel("title", curves * 2, curves)  # no room: the values are in its description


def test_tables_of_comparison_and_sweep_are_on_the_page(tmp_path):
    run = made_run(tmp_path / "run")
    (run / "compare").mkdir()
    assert "The comparison is not finished" in page_of(run)[1].text
    figures = {"accuracies": [90.0], "accuracy_mean": 90.25, "accuracy_std": None, "best_accuracy_mean": 91.0}
    figures |= {"agreement_mean": 88.5, "teacher_kl_mean": 0.5, "validation_mean": None}
    figures |= {"interval": {"low": 0.5, "high": 2.0, "over": "images"}}
    variant = figures | {"name": "kd", "p": None, "step_ms": 2.5, "ratio": 1.5}
    write_json_file(run / "compare/results.json", {"teacher": None, "rows": [variant], "num_diverged": {}})
    (run / "sweep").mkdir()
    point = figures | {"settings": {"student.train.lr": 0.05}, "alone": None, "gain_mean": 1.25}
    write_json_file(run / "sweep/results.json", {"keys": ["student.train.lr"], "rows": [point]})
    _, read, _ = page_of(run)
    (compared,), (swept,) = read.table("made: comparison over"), read.table("made: 1 settings over")
    assert (compared["variant"], compared["test accuracy %"], compared["ms / step"]) == ("kd", "90.25", "2.50")
    assert (swept["lr"], swept["test accuracy %"], swept["gain"]) == ("0.05", "90.25", "+1.25")
    assert compared["95 % interval"] == swept["its 95 % interval"] == "+0.50 to +2.00 over images"
    assert "made: comparison over" in kdpipe_here("report", run, "--full", "--no-html").stdout
    write_json_file(run / "sweep/results.json", {"keys": 3})
    assert "sweep/results.json is damaged" in page_of(run)[1].text
    assert kdpipe_here("report", run, "--full", "--no-html").exit_code == 1
