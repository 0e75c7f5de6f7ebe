"""`kdpipe run` from start to end, and errors on the way."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import zarr
from support.kdpipe_process import kdpipe, kdpipe_here
from support.made_store import folder_bytes

from kdpipe.store.fs.checksums import SUMS, write_with_sum


def full_report(run):
    return kdpipe_here("report", run, "--full", "--no-html").stdout


def test_a_run_ends_with_a_table_and_its_files(done):
    run, output = done
    made = ("teacher", "student alone", "student distilled", "pruned", "pruned + INT8")
    assert "the student reaches" in " ".join(output.split()[:20])
    for name, shown in [(name, output) for name in made[:3]] + [(name, full_report(run)) for name in made]:
        assert re.search(rf"^\s*{re.escape(name)}\s+\d+\.\d\d", shown, re.MULTILINE), name
    report = json.loads(kdpipe_here("report", run, "--json").stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert tuple(rows) == made
    assert all(row["num_seeds"] == 1 and row["num_macs"] > 0 for row in rows.values())
    assert all(row["onnx_agreement"] >= 99 and Path(row["files"][0]).exists() for row in rows.values())
    for row in rows.values():
        assert all(row["latency_ms"][size]["p95_ms"] >= row["latency_ms"][size]["p50_ms"] > 0 for size in ("1", "64"))
        assert row["of_teacher"] == rows["teacher"]["file_bytes"] / row["file_bytes"]
    sizes = {name: (row["num_parameters"], row["num_macs"], row["file_bytes"]) for name, row in rows.items()}
    assert sizes["teacher"] > sizes["student distilled"] > sizes["pruned"]
    assert sizes["student alone"] == sizes["student distilled"]
    assert report["missing"] == []


def test_the_plot_shows_every_network_with_a_file(done):
    plot = (done[0].parent / "pareto.svg").read_text()
    assert str(done[0] / "compressed" / "pareto.svg") in full_report(done[0])
    for name in ("teacher", "student distilled", "pruned", "pruned + INT8"):
        assert f">{name}<" in plot, name


def test_exported_files_agree_with_torch(done):
    """onnxruntime reaches the reported accuracy with the INT8 file on the test set."""
    from kdpipe.stages.data.config import DataConfig
    from kdpipe.stages.data.load import load_dataset

    run, _ = done
    test_set = load_dataset(DataConfig(name="digits", num_train=200), "test")
    for folder in ("teacher", "students/distilled-seed0", "compressed/pruned-seed0", "compressed/int8-seed0"):
        session = onnxruntime.InferenceSession(run / folder / "model.onnx")
        scale = json.loads(session.get_modelmeta().custom_metadata_map["normalization"])
        images = (test_set.images.float() / 255 - scale["mean"][0]) / scale["std"][0]
        logits = session.run(["logits"], {"images": images.numpy()})[0]
        accuracy = float((logits.argmax(1) == test_set.labels.numpy()).mean())
        stated = json.loads((run / folder / "result.json").read_text())["accuracy"]
        assert accuracy == pytest.approx(stated, abs=0.006), folder


def test_the_store_has_the_teachers_logits(done):
    """Recompute the logits with onnxruntime, without the store's reader or the stage."""
    from kdpipe.stages.data.config import DataConfig
    from kdpipe.stages.data.load import load_dataset
    from kdpipe.stages.views.config import Views
    from kdpipe.stages.views.renderer import Renderer

    run, _ = done
    train_set = load_dataset(DataConfig(name="digits", num_train=200), "train")
    session = onnxruntime.InferenceSession(run / "teacher" / "model.onnx")
    scale = json.loads(session.get_modelmeta().custom_metadata_map["normalization"])
    group = zarr.open_group(run / "store.zarr", mode="r")
    positions = {int(sample_id): position for position, sample_id in enumerate(train_set.sample_ids)}
    rows = [positions[int(sample_id)] for sample_id in group["samples/ids"][:]]
    assert sorted(rows) == list(range(200))
    renderer = Renderer(Views(operations=({"name": "RandomCrop", "padding": 1},)), 1, (8, 8))
    for view in (0, 29):
        images, ids = train_set.images[rows], train_set.sample_ids[rows]
        shown = renderer.render_batch(images, ids, view)
        images = (shown.float() / 255 - scale["mean"][0]) / scale["std"][0]
        logits = session.run(["logits"], {"images": images.numpy()})[0]
        np.testing.assert_allclose(group["logits"][view], logits, rtol=2e-3, atol=5e-3)


def test_a_finished_run_is_not_repeated(done, recipe):
    run, output = done
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    again = kdpipe("run", recipe, "--run", run)
    assert again.returncode == 0
    assert again.stdout == output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_a_changed_recipe_is_refused_with_stored_and_wanted(done, recipe):
    run, _ = done
    for change, stage, pair in (
        ("teacher.train.lr=0.01", "train-teacher", "train.lr: stored 0.05, wanted 0.01"),
        ("seed=5", "cache-teacher", "seed: stored 0, wanted 5"),
        ("seed=5", "train-student", "seed: stored 0, wanted 5"),
        ("teacher.train.lr=0.01", "compress", "train.lr: stored 0.05, wanted 0.01"),
        ("views.operations.0.padding=2", "cache-teacher", "views.operations.0.padding: stored 1, wanted 2"),
        ("views.seed=8", "train-student", "views.seed: stored 0, wanted 8"),
        ("data.test_share=0.3", "cache-teacher", "data.ids_and_labels_sha256: stored"),
        ("teacher.model.args.width=9", "train-student", "teacher.architecture.args.width: stored 8, wanted 9"),
        ("distill.0.temperature=2", "compress", "stored"),
    ):
        ended = kdpipe_here(stage, recipe, "--run", run, "--set", change)
        assert ended.exit_code == 12, (change, ended.stderr)
        assert pair in ended.stderr


@pytest.fixture(scope="module")
def other(tmp_path_factory, recipe):
    """A run of the same recipe up to its store, with another teacher seed."""
    run = tmp_path_factory.mktemp("other") / "run"
    for stage in ("train-teacher", "cache-teacher"):
        assert kdpipe_here(stage, recipe, "--run", run, "--set", "seed=5").exit_code == 0
    return run


def test_a_store_of_another_teacher_is_refused(done, other, recipe, tmp_path):
    run = copied(done, tmp_path)
    for folder in (run / "store.zarr", run / "students"):
        shutil.rmtree(folder)
    shutil.copytree(other / "store.zarr", run / "store.zarr")
    ended = kdpipe_here("train-student", recipe, "--run", run)
    assert ended.exit_code == 12
    assert re.search(r"teacher.weights_sha256: stored '\w{12}\.\.\.', wanted '\w{12}\.\.\.'", ended.stderr)
    assert not (run / "students").exists()


def test_one_student_learns_from_two_stores(done, other, recipe, tmp_path):
    run, _ = done
    stores = f"student.stores=['{run / 'store.zarr'}', '{other / 'store.zarr'}']"
    ended = kdpipe_here("train-student", recipe, "--run", tmp_path / "both", "--set", stores, "--json")
    assert ended.exit_code == 0, ended.stderr
    distilled = json.loads(ended.stdout)["students"]
    assert (
        len(json.loads((tmp_path / "both/students/distilled-seed0/job.json").read_text())["distillation"]["stores"])
        == 2
    )
    assert torch.isfinite(torch.tensor(distilled["distilled"][0]["cross_entropy"]))


def test_students_without_their_baseline(done, recipe, tmp_path):
    run = copied(done, tmp_path)
    for folder in run.glob("students/alone-*"):
        shutil.rmtree(folder)
    ended = kdpipe_here("train-student", recipe, "--run", run, "--set", "student.baseline=false", "--json")
    assert list(json.loads(ended.stdout)["students"]) == ["distilled"]
    assert kdpipe_here("report", run, "--no-html").exit_code == 0
    (status,) = json.loads(kdpipe_here("status", run, "--json").stdout)["runs"]
    assert status["num_networks_done"] == status["num_networks"]


def copied(done, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(done[0], run)
    return run


def test_a_swapped_network_is_refused(done, recipe, tmp_path):
    run = copied(done, tmp_path)
    other = (run / "students/alone-seed0/model.safetensors").read_bytes()
    write_with_sum(run / "students/distilled-seed0/model.safetensors", other)
    shutil.rmtree(run / "compressed")
    ended = kdpipe_here("compress", recipe, "--run", run)
    assert ended.exit_code == 1, ended.stderr
    assert "model.safetensors does not hold the weights that" in ended.stderr


def test_a_refused_command_changes_nothing_in_the_run_folder(done, recipe, tmp_path):
    run = copied(done, tmp_path)
    before = folder_bytes(run)
    assert kdpipe_here("run", recipe, "--run", run, "--set", "teacher.train.lr=0.01").exit_code == 12
    after = folder_bytes(run)
    # That it was tried, and refused, is noted; what the folder says of itself stays.
    noted = {".kdpipe.lock", ".run.json.lock", "events.jsonl", "run.json", SUMS}
    assert {name for name in before | after if before.get(name) != after.get(name)} <= noted
    were, are = (json.loads(files["run.json"]) for files in (before, after))
    assert are["sessions"][-1]["exit_code"] == 12
    assert {**were, "sessions": are["sessions"]} == are


def test_missing_shards_are_recomputed_and_damaged_ones_named(done, recipe, tmp_path):
    run = copied(done, tmp_path)
    shard = run / "store.zarr" / "logits" / "c" / "2" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    shutil.rmtree(run / "students")
    damaged = kdpipe_here("train-student", recipe, "--run", run)
    assert damaged.exit_code == 1
    assert str(shard) in damaged.stderr
    shard.unlink()
    assert "view 2, shard 0" in kdpipe_here("store", "info", run / "store.zarr").stdout
    assert kdpipe_here("cache-teacher", recipe, "--run", run).exit_code == 0
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("file", ["recipe.json", "teacher/result.json", "compressed/int8-seed0/result.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "garbage", ""])
def test_a_damaged_record_is_one_sentence(done, tmp_path, file, text):
    run = copied(done, tmp_path)
    (run / file).write_text(text)
    ended = kdpipe_here("report", run, "--no-html")
    assert ended.exit_code == 1
    assert ended.stderr.startswith("kdpipe: error: ")
    assert ended.stderr.count("\n") == 1


def test_a_folder_of_something_else_is_refused(recipe, tmp_path):
    (tmp_path / "recipe.json").write_text('{"pie": 1}')
    ended = kdpipe_here("train-teacher", recipe, "--run", tmp_path)
    assert ended.exit_code == 1
    assert "is not a run folder of this version" in ended.stderr
    assert (tmp_path / "recipe.json").read_text() == '{"pie": 1}'


def test_an_unprunable_student_is_refused_before_training(recipe, tmp_path):
    ended = kdpipe_here("run", recipe, "--run", tmp_path / "run", "--set", "compress.prune.round_to=64")
    assert ended.exit_code == 1
    assert "removes no channel" in ended.stderr
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_complete_store_of_another_run_needs_no_teacher(done, recipe, tmp_path):
    """The report takes the teacher's figures from beside the store."""
    run, sets = tmp_path / "new", [f"cache.store={done[0] / 'store.zarr'}", "compress.steps=[]"]
    arguments = [argument for change in sets for argument in ("--set", change)]
    ended = kdpipe_here("run", recipe, "--run", run, *arguments, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert not (run / "teacher").exists()
    rows = {row["kind"]: row["accuracy_mean"] for row in json.loads(ended.stdout)["rows"]}
    assert rows["teacher"] == 100 * json.loads((done[0] / "teacher" / "result.json").read_text())["accuracy"]
    refused = kdpipe_here("run", recipe, "--run", tmp_path / "other", *arguments, "--set", "views.seed=7")
    assert refused.exit_code == 12
    assert "views.seed" in refused.stderr
    assert not (tmp_path / "other" / "teacher").exists()
