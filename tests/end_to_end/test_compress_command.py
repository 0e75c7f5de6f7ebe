"""`kdpipe compress` step by step and with an external student, and `kdpipe sensitivity`."""

import json
import shutil

import pytest
import torch
from support.kdpipe_process import kdpipe_here
from support.made_store import folder_bytes

from kdpipe import load_student
from kdpipe.stages.models.safetensors_io import load_tensors


def arguments(done, recipe, run):
    """The recipe with the finished run's store and teacher, in another folder."""
    shutil.copytree(done[0] / "teacher", run / "teacher", dirs_exist_ok=True)
    return (recipe, "--run", run, "--set", f"cache.store={done[0] / 'store.zarr'}")


def test_single_steps_run_in_order_and_report_what_is_missing(done, recipe, tmp_path):
    again = kdpipe_here("compress", recipe, "--run", done[0], "--only", "export", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["artifacts"][0]["folder"].endswith("artifacts-seed0")
    assert "not pruned: fc (it writes the logits)" in kdpipe_here("compress", recipe, "--run", done[0]).stdout
    early = kdpipe_here("compress", *arguments(done, recipe, tmp_path / "run"), "--only", "quantize")
    assert early.exit_code == 1
    assert "run `kdpipe compress --only prune` first" in early.stderr
    wrong = kdpipe_here("compress", recipe, "--only", "shrink")
    assert wrong.exit_code == 2


def test_an_external_student_leaves_the_runs_own_alone(done, recipe, tmp_path):
    run = tmp_path / "run"
    state = load_tensors(done[0] / "students" / "distilled-seed0" / "model.safetensors")[0]
    torch.save(
        {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
        tmp_path / "external.pt",
    )
    common = (*arguments(done, recipe, run), "--set", "compress.steps=[]")
    ended = kdpipe_here("compress", *common, "--from", tmp_path / "external.pt")
    assert ended.exit_code == 0, ended.stderr
    assert "exported: student" in ended.stdout
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"teacher", "compressed-external"}
    stored = load_tensors(run / "compressed-external" / "artifacts-seed0" / "student" / "model.safetensors")[0]
    assert stored["fc.weight"].dtype == torch.bfloat16
    report = kdpipe_here("report", run, "--no-html")
    assert report.exit_code == 0, report.stderr
    assert "student given" in report.stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"hello", "is damaged or no torch state dict"), (None, "not found; name a weights file")],
    ids=["text", "absent"],
)
def test_an_invalid_student_file_is_one_sentence(done, recipe, tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "external.pt").write_bytes(content)
    ended = kdpipe_here("compress", *arguments(done, recipe, tmp_path / "run"), "--from", tmp_path / "external.pt")
    assert ended.exit_code == 1
    assert sentence in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_sensitivity_ranks_the_layers_and_writes_nothing(done, recipe):
    before = folder_bytes(done[0])
    ended = kdpipe_here("sensitivity", recipe, "--run", done[0], "--batches", "2", "--json")
    assert ended.exit_code == 0, ended.stderr
    layers = json.loads(ended.stdout)["layers"]
    assert {layer["path"] for layer in layers} >= {"stage1.0", "stage2.0", "fc"}
    assert [layer["kl_recovered"] for layer in layers] == sorted(
        (layer["kl_recovered"] for layer in layers), reverse=True
    )
    shown = kdpipe_here("sensitivity", recipe, "--run", done[0], "--batches", "2").stdout
    assert f'compress.quantize.exclude=["{layers[0]["path"]}"]' in shown
    assert folder_bytes(done[0]) == before


def test_invalid_settings_are_refused_before_fine_tuning(done, recipe, tmp_path):
    common = arguments(done, recipe, tmp_path / "run")
    low_rank = ("--set", "compress.prune.kind=low-rank", "--set", "compress.prune.budget=parameters")
    for changes, exit_code, sentence in (
        (
            ("--only", "prune", "--set", "compress.steps=['quantize']"),
            2,
            "compress.steps is ['quantize']",
        ),
        (("--set", "distill=[]"), 2, "has no [[distill]]"),
        (("--set", "compress.quantize.exclude=['nosuch']"), 1, "has no module 'nosuch'"),
        (("--set", "compress.opset=99"), 1, "opset 99 (compress.opset)"),
        (("--set", "compress.opset=13"), 1, "compress.opset"),
        (("--set", "compress.latency_batch_sizes=[1000000000000]"), 2, "latency_batch_sizes"),
        (("--set", "compress.prune.round_to=64"), 1, "removes no channel"),
        ((*low_rank, "--set", "compress.prune.round_to=64"), 1, "no layer of this model can be factored"),
        (
            (*low_rank, "--set", "compress.prune.ratio=0.99"),
            1,
            "low ranks cannot leave 1.0% of this model",
        ),
        ((*low_rank, "--set", "compress.prune.scope=global"), 2, "leave out importance, scope and heads"),
    ):
        ended = kdpipe_here("compress", *common, *changes)
        assert (ended.exit_code, sentence in ended.stderr) == (exit_code, True), (changes, ended.stderr)
        assert "Traceback" not in ended.stderr and not (tmp_path / "run" / "compressed").exists()


def test_layers_of_low_rank_from_the_command_line(done, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done[0] / "students", run / "students")
    keys = ("kind=low-rank", "budget=macs", "ratio=0.3", "round_to=1")
    settings = [part for key in keys for part in ("--set", f"compress.prune.{key}")]
    common = (*arguments(done, recipe, run), *settings, "--set", "compress.baselines=false")
    ended = kdpipe_here("compress", *common)
    assert ended.exit_code == 0, ended.stderr
    assert "not pruned: fc (it writes the logits)" in ended.stdout
    results = [
        json.loads((run / folder / "result.json").read_text())
        for folder in ("students/distilled-seed0", "compressed/pruned-seed0")
    ]
    assert results[1]["num_macs"] <= 0.7 * results[0]["num_macs"] and results[1]["lowered_ranks"]
    student = load_student(run / "compressed" / "artifacts-seed0" / "int8" / "model.safetensors")
    assert student.architecture["ranks"] == {path: rank for path, rank, _ in results[1]["lowered_ranks"]}
    before = folder_bytes(run / "compressed")
    assert kdpipe_here("compress", *common).exit_code == 0 and folder_bytes(run / "compressed") == before
    report = kdpipe_here("report", run, "--no-html")
    assert report.exit_code == 0 and "pruned + INT8" in report.stdout, report.stderr


def test_unusual_file_names_are_kept(done, recipe, tmp_path):
    run = tmp_path / "[red]run[/bold] \U0001f600"
    shutil.copy(done[0] / "students" / "distilled-seed0" / "model.safetensors", tmp_path / "\U0001f600 'x'.safetensors")
    common = (*arguments(done, recipe, run), "--set", "compress.steps=[]")
    ended = kdpipe_here("compress", *common, "--from", tmp_path / "\U0001f600 'x'.safetensors")
    assert ended.exit_code == 0, ended.stderr
    report = kdpipe_here("report", run, "--no-html")
    assert report.exit_code == 0, report.stderr
    assert str(run) in report.stdout.replace("\n", "")


@pytest.mark.parametrize("text", ["[]", "{}", '{"cpu": "x", "num_threads": 1, "batch_sizes": [1], "files": {"a": 1}}'])
def test_a_damaged_record_of_latencies_is_one_sentence(done, recipe, tmp_path, text):
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    (run / "compressed" / "latency-seed0.json").write_text(text)
    ended = kdpipe_here("compress", recipe, "--run", run)
    assert ended.exit_code == 1
    assert "latency-seed0.json" in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr
