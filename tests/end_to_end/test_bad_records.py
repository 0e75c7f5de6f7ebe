"""Damaged, wrong or hostile records in a run folder: commands name the record and resume with the good one."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from support.invalid_files import DEEP, ESCAPE, NO_RECORDS, PLACES, answer, put, refused, with_value

from kdpipe.stages.training import checkpoint
from kdpipe.store.fs.checksums import SUMS


@pytest.fixture
def run(done, tmp_path):
    """A copy of a finished run, without the checksums that would find the damage first, as of an older kdpipe."""
    return Path(shutil.copytree(done[0], tmp_path / "run", ignore=shutil.ignore_patterns(SUMS)))


RECORDS = ("recipe.json", "teacher/result.json", "compressed/latency-seed0.json")


@pytest.mark.parametrize("name", RECORDS)
def test_a_report_names_the_damaged_record(run, name):
    good = (run / name).read_bytes()
    for what in NO_RECORDS:
        put(run / name, what)
        assert Path(name).name in refused("report", run)
    put(run / name, good)
    assert answer("report", run, "--no-html").exit_code == 0


WRONG_VALUES = [
    ("recipe.json", ("name",), 5),
    ("recipe.json", ("student", "seeds"), []),
    ("recipe.json", ("student", "seeds"), ["../../x"]),
    ("recipe.json", ("compress", "quantize", "scheme"), "../x"),
    ("recipe.json", ("compress", "steps"), 5),
    ("teacher/result.json", ("accuracy",), float("nan")),
    ("teacher/result.json", ("accuracy",), 10**300),
    ("teacher/result.json", ("onnx_bytes",), -1),
    ("teacher/result.json", ("identity",), {}),
    ("teacher/result.json", ("examined",), 5),
    ("compressed/latency-seed0.json", ("files",), []),
    ("compressed/latency-seed0.json", ("batch_sizes",), [float("inf")]),
]


@pytest.mark.parametrize(("name", "path", "value"), WRONG_VALUES)
def test_a_record_with_an_absurd_value_is_refused(run, name, path, value):
    put(run / name, with_value((run / name).read_bytes(), path, value))
    assert Path(name).name in refused("report", run)


def test_untrusted_names_are_printed_without_control_characters(run):
    latency, teacher = run / "compressed" / "latency-seed0.json", run / "teacher" / "result.json"
    put(run / "recipe.json", with_value((run / "recipe.json").read_bytes(), ("name",), f"{ESCAPE}[/red]"))
    put(latency, with_value(latency.read_bytes(), ("cpu",), f"{ESCAPE}[/red]"))
    put(teacher, with_value(teacher.read_bytes(), ("examined", "per_class", 0, "name"), ESCAPE))
    (run / "teacher" / "metrics.jsonl").write_text(DEEP + f'\n{{"epoch": 1e308, "{ESCAPE}": 1}}\n')
    ended = answer("report", run)
    assert ended.exit_code == 0, ended.stderr
    assert "\x1b[31m" not in ended.output
    assert "\u202e" not in ended.output
    page = (run / "report.html").read_text()
    assert "\x1b" not in page
    assert "<script" not in page


def test_status_of_a_folder_with_damaged_records(run):
    for what in PLACES:
        for name in ("recipe.json", "run.json", "events.jsonl", "teacher/result.json", "teacher/metrics.jsonl"):
            put(run / name, what)
        ended = answer("status", run.parent)
        assert ended.exit_code == 0, ended.stderr


@pytest.mark.parametrize(
    ("name", "substitutes"),
    [
        ("teacher/result.json", ("pipe", "{}", b"\x80")),
        ("teacher/job.json", ("pipe", "[]", DEEP)),
        ("teacher/model.safetensors", ("pipe", "folder", "", "garbage" * 10, b"\x08\x08\x12\x07pytorch")),
        ("students/distilled-seed0/model.safetensors", ("zeros", "[]")),
        ("compressed/artifacts-seed0/card.json", ("folder",)),
    ],
)
def test_a_stage_refuses_a_replaced_input_file(recipe, run, name, substitutes):
    command = ("compress" if "card" in name else "run", recipe, "--run", run)
    good = (run / name).read_bytes()
    others = {path: path.read_bytes() for path in run.rglob("model.*") if path != run / name}
    for what in substitutes:
        put(run / name, what)
        refused(*command)
    put(run / name, good)
    ended = answer(*command)
    assert ended.exit_code == 0, ended.stderr
    assert (run / name).read_bytes() == good
    assert {path: path.read_bytes() for path in others} == others
    assert not list(run.rglob("*.partial"))


def test_a_card_that_was_tampered_with_is_written_again(recipe, run):
    card = run / "compressed" / "artifacts-seed0" / "card.json"
    good = card.read_bytes()
    put(card, with_value(good, ("reason",), None))
    ended = answer("compress", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    assert card.read_bytes() == good


@pytest.mark.parametrize("what", ["folder", "pipe", "circle", "passwords"])
def test_a_lock_that_is_not_a_file_is_refused(recipe, run, what):
    lock = run / ".kdpipe.lock"
    put(lock, what)
    before = lock.lstat()
    assert ".kdpipe.lock cannot be used" in refused("train-teacher", recipe, "--run", run)
    assert (lock.lstat().st_mode, lock.lstat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("what", ["folder", "pipe", "passwords", DEEP])
def test_an_unwritable_event_log_does_not_stop_a_job(recipe, run, what):
    for name in ("events.jsonl", "run.json"):
        put(run / name, what)
    ended = answer("train-teacher", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_page_replaces_no_folder_and_follows_no_link(run, tmp_path):
    page = run / "report.html"
    put(page, "folder")
    ended = answer("report", run)
    assert ended.exit_code in (1, 2)
    assert f"{page}: this is a folder" in ended.stderr
    assert page.is_dir()
    page.rmdir()
    (tmp_path / "linked").write_text("linked")
    page.symlink_to(tmp_path / "linked")
    assert answer("report", run).exit_code == 0
    assert (tmp_path / "linked").read_text() == "linked"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert not list(run.rglob("*.partial"))


# Checkpoints


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """A run whose teacher was interrupted during training."""
    run, saved = tmp_path_factory.mktemp("stopped") / "run", []

    def save(*what):
        checkpoint.save_checkpoint(*what)
        saved.append(what)
        if len(saved) == 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kdpipe.stages.training.loop.save_checkpoint", save)
        assert answer("train-teacher", recipe, "--run", run).exit_code == 130
    return run


def checkpoint_with(path, change):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["kdpipe"])
    record = change(tensors, record) or record
    path.write_bytes(save(tensors, metadata={"kdpipe": json.dumps(record)}))


CHECKPOINTS = {
    "epoch": lambda _, record: record.update(epoch=10**9),
    "epoch text": lambda _, record: record.update(epoch=ESCAPE),
    "step": lambda _, record: record.update(step=-1),
    "later step": lambda _, record: record.update(step=10**9),
    "history": lambda _, record: record.update(history=[{"accuracy": "x"}], epoch=1),
    "no accuracy": lambda _, record: record.update(history=[{"wall_s": 1.0}], epoch=1),
    "micro_batches": lambda _, record: record.update(micro_batches="x"),
    "record": lambda *_: [1],
    "no record": lambda *_: {"a": 1},
    "weights": lambda tensors, _: tensors.update({"modules/student.fc.bias": torch.ones(3)}),
    "momentum": lambda tensors, _: tensors.update({"optimizer/0/momentum_buffer": torch.ones(3)}),
    "another parameter": lambda tensors, _: tensors.update({"optimizer/99/momentum_buffer": torch.ones(3)}),
    "no parameter": lambda tensors, _: tensors.update({f"optimizer/{ESCAPE}/x": torch.ones(3)}),
}


def test_a_damaged_checkpoint_is_refused_and_a_good_one_resumes(recipe, stopped, done):
    command, path = ("train-teacher", recipe, "--run", stopped), stopped / "teacher" / "checkpoint.safetensors"
    good = path.read_bytes()
    for change in CHECKPOINTS.values():
        put(path, good)
        checkpoint_with(path, change)
        assert "checkpoint.safetensors" in refused(*command)
    for what in ("folder", "pipe", "zeros", "passwords", "", pickle.dumps({"epoch": 1}), good[:-50]):
        put(path, what)
        assert "checkpoint.safetensors" in refused(*command)
    put(path, good)
    assert answer(*command).exit_code == 0
    model = Path("teacher", "model.safetensors")
    assert (stopped / model).read_bytes() == (done[0] / model).read_bytes()
