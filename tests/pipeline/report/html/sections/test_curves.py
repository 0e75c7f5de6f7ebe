"""Curves of accuracies and losses by epoch, and reliability."""

import json
import math
import re

import pytest
from support.report_page import examined, leave_job, made_run, page_of

from kdpipe.pipeline.report.chart import thinned
from kdpipe.pipeline.report.html.read import Job, Network
from kdpipe.pipeline.report.html.sections.curves import Curve, curve_panel
from kdpipe.pipeline.report.html.sections.losses import loss_panel
from kdpipe.pipeline.report.html.sections.reliability import pooled_bins


def test_curves_of_pruning_and_quantization_have_own_axes(tmp_path):
    run = made_run(tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["compress"]["steps"] = ["prune", "quantize"]
    (run / "recipe.json").write_text(json.dumps(recipe))
    for kind in ("pruned", "int8"):
        leave_job(run / f"compressed/{kind}-seed0", 0.8, examined())
    text, read, _ = page_of(run)
    assert "Fine-tuning of the compressed students" in read.text
    assert {"pruned ends at 80.00 %", "pruned + INT8 ends at 80.00 %"} <= set(re.findall("<desc>(.*?)</desc>", text))


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


def test_loss_of_a_single_epoch_is_a_dot():
    assert "<use " in loss_panel("network", {"kd": {1: 0.5}})
    assert "<use " not in loss_panel("network", {"kd": {1: 0.5, 2: 0.4}})


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
