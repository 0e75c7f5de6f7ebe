"""`kdpipe report` of synthetic run folders: tables and JSON."""

import json
import os
import re
from pathlib import Path

import pytest
from support.kdpipe_process import kdpipe_here

from kdpipe.pipeline.report.networks import network_entries
from kdpipe.pipeline.report.printing import page_path

FIGURES = {
    "accuracy": 0.5,
    "cross_entropy": 1.0,
    "best_accuracy": 0.5,
    "num_parameters": 10,
    "onnx_bytes": 2048,
    "onnx_agreement": 1.0,
    "identity": {"weights_sha256": "ab" * 32},
    "wall_s": 1.0,
}


def examined(agreement=None, cat=0.8, dog=0.4, names=("cat", "dog", "eel")):
    """Return an evaluation as stages.examine writes it; the third class has no test samples."""
    return {
        "top1": 0.5,
        "top5": None,
        "cross_entropy": 1.0,
        "ece": 0.125,
        "agreement": agreement,
        "teacher_kl": None if agreement is None else 1 - agreement,
        "per_class": [
            {"name": name, "accuracy": accuracy, "num_samples": num_samples}
            for name, accuracy, num_samples in zip(names, (cat, dog, None), (5, 5, 0), strict=True)
        ],
    }


def run_folder(folder, jobs, seeds=(0,)):
    """Make a run with these evaluations by job folder; ... is a job without one."""
    recipe = {"name": "made", "student": {"seeds": list(seeds)}, "compress": {"steps": []}}
    for path, found in jobs.items():
        (folder / path).mkdir(parents=True)
        result = FIGURES if found is ... else FIGURES | {"examined": found}
        (folder / path / "result.json").write_text(json.dumps(result))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def test_agreement_table_has_seed_means_and_worst_class(tmp_path):
    jobs = {
        "teacher": examined(),
        "students/distilled-seed0": examined(0.75),
        "students/distilled-seed1": examined(0.25, dog=0.6),
    }
    run = run_folder(tmp_path, jobs, seeds=(0, 1))
    text = " ".join(kdpipe_here("report", run, "--full", "--no-html").stdout.split())
    assert "teacher 50.00 - - - 12.50 dog: 40.00" in text
    distilled = "50.00 ± 0.00 - 50.00 ± 35.36 0.500 ± 0.354 12.50 ± 0.00 dog: 50.00 ± 14.14"
    assert f"student distilled {distilled}" in text


def test_json_has_metrics_of_each_class(tmp_path):
    run = run_folder(tmp_path, {"teacher": ..., "students/distilled-seed0": examined(0.75)})
    teacher, distilled = json.loads(kdpipe_here("report", run, "--json").stdout)["rows"]
    figures = ("top5_mean", "agreement_mean", "agreement_std", "teacher_kl_mean", "ece_mean")
    assert [teacher[name] for name in figures] == [None] * 5
    assert teacher["per_class"] is None
    assert [distilled[name] for name in figures] == [None, 75.0, None, 0.25, 12.5]
    assert [(one["name"], one["accuracy_mean"], one["num_samples"]) for one in distilled["per_class"]] == [
        ("cat", 80.0, 5),
        ("dog", 40.0, 5),
        ("eel", None, 0),
    ]


def test_run_without_evaluations_has_no_agreement_table(tmp_path):
    ended = kdpipe_here("report", run_folder(tmp_path, {"teacher": ...}), "--full", "--no-html")
    assert ended.exit_code == 3
    assert "50.00" in ended.stdout
    assert "Agreement with the teacher" not in ended.stdout


def test_long_class_names_are_shortened_in_tables_only(tmp_path):
    run = run_folder(tmp_path, {"teacher": examined(names=("cat", "d" * 200, "eel"))})
    text = "".join(kdpipe_here("report", run, "--full", "--no-html").stdout.split())
    assert "d" * 17 + "...:40.00" in text
    assert "d" * 18 not in text
    assert json.loads(kdpipe_here("report", run, "--json").stdout)["rows"][0]["per_class"][1]["name"] == "d" * 200


def test_class_names_are_escaped_in_the_terminal(tmp_path):
    names = ("cat", "\x1b[2J[red]dog[/]", "eel")
    stdout = kdpipe_here(
        "report", run_folder(tmp_path, {"teacher": examined(names=names)}), "--full", "--no-html"
    ).stdout
    assert "\x1b[2J" not in stdout
    assert "?[2J[red]dog[/]: 40.00" in stdout


@pytest.mark.parametrize("damage", ["pie", {}, {**examined(), "per_class": ["pie"]}, {**examined(), "ece": "high"}])
def test_damaged_evaluation_is_an_error_with_its_folder(tmp_path, damage):
    ended = kdpipe_here("report", run_folder(tmp_path, {"teacher": damage}), "--no-html")
    assert ended.exit_code == 1
    assert ended.stderr.startswith("kdpipe: error: ")
    assert ended.stderr.count("\n") == 1
    assert str(tmp_path / "teacher") in ended.stderr


def latency_of(files, folder):
    times = {name: {"4": {"p50_ms": ms, "p95_ms": 2 * ms}} for name, ms in files.items()}
    record = {"cpu": "a CPU", "num_threads": 2, "batch_sizes": [4], "files": times}
    folder.mkdir(exist_ok=True)
    (folder / "latency-seed0.json").write_text(json.dumps(record))


def test_latency_of_undistilled_student_with_projector(tmp_path):
    run = run_folder(tmp_path, {"students/alone-seed0": ..., "students/distilled-seed0": ...})
    for measured, alone in (({"student": 2.0}, 2.0), ({"student": 2.0, "alone": 1.0}, 1.0)):
        latency_of(measured, run / "compressed")
        rows = json.loads(kdpipe_here("report", run, "--json").stdout)["rows"]
        found = {row["name"]: row["latency_ms"]["4"]["p50_ms"] for row in rows}
        assert found == {"student alone": alone, "student distilled": 2.0}
        shown = kdpipe_here("report", run, "--full", "--no-html").stdout
        assert "Cost (onnxruntime): 2 threads of a CPU" in shown
        assert ("1.000 (2.000)" in shown) == ("alone" in measured)


def test_cost_table_has_rows_for_other_runtimes(tmp_path):
    run = run_folder(tmp_path, {"students/distilled-seed0": ...})
    latency_of({"student": 2.0, "student in openvino": 3.0}, run / "compressed")
    shown = kdpipe_here("report", run, "--full", "--no-html").stdout
    (line,) = [line for line in shown.splitlines() if "student distilled in OpenVINO" in line]
    assert "3.000 (6.000)" in line


def compressed_run(folder, accuracies, seeds=(0, 1)):
    """Make a run with these accuracies in percent by kind of network, the same for all seeds."""
    recipe = {
        "name": "made",
        "student": {"seeds": list(seeds)},
        "compress": {"steps": ["prune", "quantize"], "baselines": True},
    }
    for kind, accuracy in accuracies.items():
        for seed in seeds:
            parent = "students" if kind in ("alone", "distilled") else "compressed"
            path = folder / "teacher" if kind == "teacher" else folder / parent / f"{kind}-seed{seed}"
            path.mkdir(parents=True, exist_ok=True)
            own = {"accuracy": accuracy / 100, "onnx_bytes": None if "alone" in kind or "ptq" in kind else 1024}
            (path / "result.json").write_text(json.dumps(FIGURES | own))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def test_recovered_share_of_hard_label_loss(tmp_path):
    lossy = {"distilled": 98.0, "pruned": 97.0, "pruned-alone": 96.0, "int8": 97.5, "int8-alone": 98.5}
    run = compressed_run(tmp_path, lossy)
    found = {one["name"]: one for one in json.loads(kdpipe_here("report", run, "--json").stdout)["recovered"]}
    assert found["pruned"]["share"] == pytest.approx(0.5)
    assert found["pruned"]["points_lost_alone"] == pytest.approx(2)
    assert found["pruned + INT8"]["share"] is None  # hard labels lost nothing
    shown = " ".join(kdpipe_here("report", run, "--full", "--no-html").stdout.split())
    assert "pruned +2.00 +1.00 50 %" in shown
    assert "pruned + INT8 -0.50 +0.50 the loss is not clear" in shown


def test_networks_without_a_file_have_their_twins_size(tmp_path):
    kinds = ("distilled", "int8-unpruned", "int8-unpruned-alone", "int8-ptq")
    rows = json.loads(kdpipe_here("report", compressed_run(tmp_path, dict.fromkeys(kinds, 90.0)), "--json").stdout)[
        "rows"
    ]
    assert {row["name"]: row["file_bytes"] for row in rows} == {
        "student distilled": 1024,
        "INT8": 1024,
        "INT8, calibrated": 1024,
        "INT8, hard labels": 1024,
    }


def test_a_teacher_without_a_file_has_the_size_of_its_weights(tmp_path):
    run = run_folder(tmp_path, {"teacher": ..., "students/distilled-seed0": ...})
    teacher = FIGURES | {"onnx_bytes": None, "onnx_agreement": None, "num_parameters": 1024}
    (run / "teacher" / "result.json").write_text(json.dumps(teacher))
    rows = {row["kind"]: row for row in json.loads(kdpipe_here("report", run, "--json").stdout)["rows"]}
    assert (rows["teacher"]["file_bytes"], rows["teacher"]["of_teacher"]) == (None, None)
    assert rows["student"]["of_teacher"] == 4 * 1024 / 2048


@pytest.mark.parametrize("text", ["[]", "{}", '{"cpu": 1, "num_threads": 1, "batch_sizes": [1], "files": {"a": {}}}'])
def test_damaged_latency_record_is_one_sentence(tmp_path, text):
    run = run_folder(tmp_path, {"teacher": ...})
    (run / "compressed").mkdir()
    (run / "compressed" / "latency-seed0.json").write_text(text)
    ended = kdpipe_here("report", run, "--no-html")
    assert ended.exit_code == 1
    assert ended.stderr.count("\n") == 1 and "latency-seed0.json" in ended.stderr


def test_every_compressed_network_has_a_row(tmp_path):
    """Kinds as in tests/stages/test_compress.py."""
    compress = {"steps": ["prune", "quantize"], "baselines": True}
    kinds = {"pruned", "pruned-alone", "int8", "int8-alone", "int8-ptq", "int8-unpruned", "int8-unpruned-alone"}
    recipe = {"student": {"seeds": [0]}, "compress": compress}
    assert {place.kind for place in network_entries(recipe, tmp_path)} == {"teacher", "alone", "student", *kinds}
    recipe["compress"] = compress | {"steps": ["quantize"], "quantize": {"scheme": "int4"}}
    names = {place.kind: place.name for place in network_entries(recipe, tmp_path)}
    assert list(names)[3:] == ["int4", "int4-ptq", "int4-alone"]
    assert names["int4-ptq"] == "INT4, calibrated"


def test_short_result_has_gain_networks_and_places(tmp_path, monkeypatch):
    accuracies = {"teacher": 99.0, "alone": 90.0, "distilled": 96.0, "pruned": 95.0, "int8": 94.0, "int8-alone": 80.0}
    run = compressed_run(tmp_path / "a run", accuracies)
    artifacts = run / "compressed" / "artifacts-seed0"
    artifacts.mkdir()
    monkeypatch.setenv("COLUMNS", "80")
    for recommended in (None, "int8"):
        if recommended:
            (artifacts / "card.json").write_text(json.dumps({"ranking": ["int8", "pruned"]}))
        ended = kdpipe_here("report", run, "--no-html")
        assert ended.exit_code == 3  # the other baselines are missing
        text = " ".join(ended.stdout.split())
        assert "Distillation helped: the student reaches 96.00 ± 0.00 % test accuracy distilled" in text
        rows = re.findall(r"^  (\w.*?)  +(\d+\.\d\d) ", ended.stdout, re.MULTILINE)
        small = "pruned + INT8" if recommended else "pruned"
        assert [name for name, _ in rows] == ["teacher", "student alone", "student distilled", small]
        assert (f"deploy {artifacts / 'int8'} (recommended: pruned + INT8)" in text) == bool(recommended)
        assert f"page kdpipe report '{run}'" in text
        assert f"tables kdpipe report --full '{run}'" in text
    (artifacts / "card.json").write_text('{"ranking": 3}')
    assert kdpipe_here("report", run, "--no-html").exit_code == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("sweep", "The best of 2 settings on the test images is temperature 8, epochs 1: 97.00 % test accuracy"),
        ("compare", "The best of 2 variants on the validation images is kd: 97.00 % test accuracy"),
    ],
)
def test_a_sweep_or_comparison_is_judged_by_its_best_row(tmp_path, command, told):
    """The recipe's own students are not missing: they were not asked for."""
    run = run_folder(tmp_path / "run", {"teacher": examined()})
    figures = {"accuracy_std": None, "interval": {"low": 1.0, "high": 3.5, "over": "images"}}
    validation = {"validation_mean": 95.0 if command == "compare" else None}
    alone = {"name": "alone", "accuracy_mean": 95.0, **figures, "validation_mean": 90.0}
    kd = {"name": "kd", "accuracy_mean": 97.0, **figures, **validation, "alone": alone}
    kd |= {"settings": {"distill.0.temperature": 8, "student.train.epochs": 1}}
    worse = kd | {"accuracy_mean": 96.0} if command == "sweep" else alone
    (run / command).mkdir()
    record = {"keys": list(kd["settings"]), "rows": [worse, kd], "teacher": {}}
    (run / command / "results.json").write_text(json.dumps(record))
    ended = kdpipe_here("report", run, "--no-html")
    assert (ended.exit_code, "missing" in ended.stdout) == (0, False)
    wanted = f"{told}, +2.00 points over the student alone (95 % interval +1.00 to +3.50 over images)."
    assert wanted in " ".join(ended.stdout.split())


def test_page_of_a_read_only_run_goes_into_the_current_folder(tmp_path, monkeypatch):
    run = tmp_path / "theirs"
    run.mkdir()
    assert page_path([run], None) == run / "report.html"
    monkeypatch.setattr(os, "access", lambda path, mode: path != run)
    assert page_path([run], None) == Path("report-theirs.html")
    assert page_path([run], tmp_path / "a.html") == tmp_path / "a.html"


def test_agreement_in_place_of_accuracy_is_named(tmp_path):
    plain = {key: value for key, value in FIGURES.items() if "accuracy" not in key}
    agrees = plain | {"metric": "agreement", "agreement": 0.75, "best_agreement": 0.75, "num_macs": None}
    run = run_folder(tmp_path, {"students/distilled-seed0": ...})
    (run / "students" / "distilled-seed0" / "result.json").write_text(json.dumps(agrees))
    text = " ".join(kdpipe_here("report", run, "--full", "--no-html").stdout.split())
    assert "Best network finished so far: student distilled, 75.00 % test agreement with the teacher." in text
    assert "accuracy" not in text
