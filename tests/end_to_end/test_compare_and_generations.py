"""`kdpipe compare` and `kdpipe generations`."""

import json
import re
import shutil

import pytest
from support.kdpipe_process import RECIPE, kdpipe_here

VARIANTS = """
[compare.label-smoothing]
label_smoothing = 0.1

[compare.at]
hard_label_weight = 1.0
distill = [{ loss = "at", layers = [["stage2", "stage2"]] }]

[compare.kd-and-rkd]
distill = [{ loss = "kd" }, { loss = "rkd", layers = [["stage2", "stage2"]] }]
"""
SHORT = ("--set", "teacher.train.epochs=2", "--set", "student.train.epochs=1", "--set", "views.num_views=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("ways") / "ways.toml"
    path.write_text(RECIPE + VARIANTS)
    return path


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("compared") / "run"
    return run, kdpipe_here("compare", recipe, "--run", run, *SHORT)


def test_the_table_has_every_variant_and_its_step_cost(compared):
    _, ended = compared
    assert ended.exit_code == 0, ended.stderr
    for name in ("alone", "label-smoothing", "at", "kd-and-rkd"):
        assert re.search(
            rf"^\s*{name}\s+\d+\.\d\d\s+[+-]\d+\.\d\d\s.*\s\d+\.\d\d\s+\d+\.\d\d\s+\d+\.\d\d\s", ended.stdout, re.M
        ), name
    assert re.search(r"^\s*alone\s.*\s1\.00\s", ended.stdout, re.M)


def test_the_store_has_the_smallest_form_for_all_variants(compared, recipe):
    run, _ = compared
    plan = json.loads(kdpipe_here("plan", recipe, "--run", run, *SHORT, "--json").stdout)
    assert plan["layers_required_by"] == {
        "features/stage2": ["distill.1 (hint)"],
        "attention/stage2": ["compare.at.distill.0 (at)"],
        "pooled/stage2": ["compare.kd-and-rkd.distill.1 (rkd)"],
    }
    assert plan["num_images"] == 0
    assert plan["test_store"]["store"] == str(run / "store.test.zarr")


def test_finished_variants_are_not_trained_again(compared, recipe):
    run, first = compared
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert len(before) == 5
    again = kdpipe_here("compare", recipe, "--run", run, *SHORT, "--json")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    rows = {row["name"]: row for row in json.loads(again.stdout)["rows"]}
    for name, row in rows.items():
        assert f"{row['accuracy_mean']:.2f}" in first.stdout
        assert row["agreement_mean"] is not None, name
    assert not (run / "compare" / "at" / "seed0" / "model.onnx").exists()


def test_a_recipe_without_variants_is_refused_with_an_example(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text(RECIPE)
    ended = kdpipe_here("compare", path, "--run", tmp_path / "run")
    assert ended.exit_code == 2
    assert "[compare.at]" in ended.stderr


def test_each_generation_learns_from_the_one_before(recipe, tmp_path):
    same = ("--set", "student.model.args.width=8", "--set", "distill=[{loss='kd'}]", "--set", "compare={}")
    first = kdpipe_here("generations", recipe, "--run", tmp_path, *SHORT, *same, "--count", "1")
    assert first.exit_code == 0, first.stderr
    student = json.loads((tmp_path / "generation1/students/distilled-seed0/result.json").read_text())
    second = kdpipe_here("generations", recipe, "--run", tmp_path, *SHORT, *same, "--count", "2", "--json")
    assert second.exit_code == 0, second.stderr
    first, following = json.loads(second.stdout)["generations"]
    assert first["students"] == [student]
    assert following["teacher"]["identity"]["weights_sha256"] == student["identity"]["weights_sha256"]
    assert following["students"][0]["identity"]["weights_sha256"] != student["identity"]["weights_sha256"]
    assert following["students"][0]["examined"]["agreement"] is not None
    assert following["alone"] == []
    shown = kdpipe_here("generations", recipe, "--run", tmp_path, *SHORT, *same, "--count", "2").stdout
    for name in ("teacher", "student alone", "generation 1", "generation 2"):
        assert re.search(rf"^\s*{name}\s+.*\d+\.\d\d", shown, re.M), name


HINT = 'distill=[{loss="hint",layers=[["stage2","stage2"]]}]'


@pytest.mark.parametrize(
    ("command", "changes", "sentence"),
    [
        ("compare", ['compare.b={distill=[{loss="hint",layers=[["fc","stage2"]]}]}'], "compare.b.distill.0 (hint)"),
        ("compare", ['compare.b={distill=[{loss="at",layers=[["stage9","stage2"]]}]}'], "(at), the student: the model"),
        ("compare", ['compare.b={distill=[{loss="at",layers=[["stage2","stage9"]]}]}'], "(at), the teacher: the model"),
        ("compare", ['compare.b={distill=[{loss="kd",store=3}]}'], "compare.b.distill.0 (kd) uses store 3"),
        ("compare", ['compare.b={distill=[{loss="simkd",layers=[["stage2","stage2"]]}]}'], "compare.b.distill.0"),
        ("compare", ["compare.alone={label_smoothing=0.1}"], "'alone' is reserved"),
        ("compare", ["compare.b={hard_label_weight=0.1}"], "compare.b"),
        ("run", ['distill=[{loss="hint",layers=[["stage2","stage9"]]}]'], "distill.0 (hint), the teacher"),
        ("run", ["student.teachers.weights=[1.0,2.0]"], "student.teachers.weights has 2 entries"),
        ("run", ["distill=[]", "compare={}"], "has no [[distill]]"),
        ("run", ['distill=[{loss="kd",weight={start=1.0,end=0.0,epochs=[10,5]}}]'],
         "the first epoch must not be after the last"),
        ("generations", ['distill=[{loss="simkd",layers=[["stage2","stage2"]]}]', "compare={}"], "simkd"),
        ("generations", [HINT, "teacher.model.args={width=8,num_stages=3}", 'distill.0.layers=[["stage2","stage3"]]'],
         "(hint), the teacher: the model has no module 'stage3'"),
    ],
)  # fmt: skip
def test_invalid_losses_are_refused_before_training(recipe, tmp_path, command, changes, sentence):
    arguments = [part for change in changes for part in ("--set", change)]
    ended = kdpipe_here(command, recipe, "--run", tmp_path / "run", *SHORT, *arguments)
    assert ended.exit_code == 2, ended.stderr
    assert sentence in ended.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.zarr"))


def test_a_diverged_variant_does_not_stop_the_others(compared, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared[0], run)
    bad = ("--set", 'compare.bad={distill=[{loss="kd",weight=1e30}]}')
    ended = kdpipe_here("compare", recipe, "--run", run, *SHORT, *bad)
    assert ended.exit_code == 0, ended.stderr
    assert "bad: 1 of 1 seeds diverged" in ended.stdout
    assert re.search(r"^\s*kd-and-rkd\s+\d", ended.stdout, re.MULTILINE)


def test_variants_compare_without_the_student_alone(compared, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared[0], run)
    shutil.rmtree(run / "students")
    ended = kdpipe_here("compare", recipe, "--run", run, *SHORT, "--set", "student.baseline=false")
    assert ended.exit_code == 0, ended.stderr
    assert not list(run.glob("students/*"))
    assert re.search(r"^\s*label-smoothing\s.*\s\+0\.00\s.*\s1\.00\s", ended.stdout, re.MULTILINE)


def test_shard_and_manifests_of_both_stores_are_repaired(compared, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared[0], run)
    shard = run / "store.test.zarr" / "logits" / "c" / "0" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    shutil.rmtree(run / "students")
    refused = kdpipe_here("train-student", recipe, "--run", run, *SHORT)
    assert refused.exit_code == 1
    assert "kdpipe store repair" in refused.stderr
    manifests = [run / name / "zarr.json" for name in ("store.zarr", "store.test.zarr")]
    before = [file.read_bytes() for file in manifests]
    for file, raw in zip(manifests, before, strict=True):
        file.write_bytes(raw[:300] + bytes([raw[300] ^ 4]) + raw[301:])
    repaired = kdpipe_here("store", "repair", recipe, "--run", run, *SHORT)
    assert repaired.exit_code == 0, repaired.stderr
    assert shard.read_bytes() == whole
    assert [file.read_bytes() for file in manifests] == before
    asked = ("--recompute", "5", "--recipe", recipe, "--run", run)
    assert kdpipe_here("store", "verify", run / "store.test.zarr", *asked, *SHORT).exit_code == 0


def test_a_missing_test_store_is_a_warning(compared, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared[0], run)
    shutil.rmtree(run / "store.test.zarr")
    shutil.rmtree(run / "students")
    ended = kdpipe_here("train-student", recipe, "--run", run, *SHORT)
    assert ended.exit_code == 0, ended.stderr
    assert "the teacher's logits of the test images are not available" in ended.stderr
    result = json.loads((run / "students/distilled-seed0/result.json").read_text())
    assert result["examined"]["agreement"] is None
