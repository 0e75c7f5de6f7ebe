import json

import pytest
from support.invalid_files import answer
from support.made_store import make_store

import kdpipe as kd
from kdpipe.store import exclusive
from kdpipe.store.fs.checksums import SUMS, write_with_sum


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    for name in ("recipe.json", "teacher/job.json", "teacher/model.onnx", "compressed/artifacts-seed0/README.md"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        write_with_sum(run / name, name.encode())
    make_store(run / "store.zarr", num_samples=50)
    return run


def test_an_intact_run_is_verified(run):
    (run / "events.jsonl").write_text("a log has no sum\n")
    ended = answer("verify", run)
    assert ended.exit_code == 0, ended.stderr
    assert f"{run}: 4 files and" in ended.stdout
    assert "1 stores were checked, nothing is damaged" in ended.stdout
    assert kd.verify(run).ok


def test_the_store_of_another_run_is_verified_too(run, tmp_path):
    user = tmp_path / "user"
    user.mkdir()
    make_store(run / "store.test.zarr", num_samples=10)
    write_with_sum(user / "recipe.json", json.dumps({"cache": {"store": str(run / "store.zarr")}}).encode())
    assert list(kd.verify(user).stores) == [run / "store.zarr", run / "store.test.zarr"]


def test_damage_is_listed_with_what_to_do(run):
    (run / "teacher" / "model.onnx").write_bytes(b"other")
    (run / "compressed" / "artifacts-seed0" / SUMS).write_bytes(b"x")
    shard = next((run / "store.zarr" / "logits" / "c").rglob("*[0-9]"))
    while shard.is_dir():
        shard = next(shard.iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    ended = answer("verify", run, "--json")
    assert ended.exit_code == 1, ended.stderr
    found = json.loads(ended.stdout)
    advice = {one["file"]: one["advice"] for one in found["damaged"]}
    assert f"delete the folder {run / 'teacher'} and run" in advice[str(run / "teacher" / "model.onnx")]
    assert str(run / "compressed" / "artifacts-seed0" / SUMS) in advice
    assert len(found["stores"][str(run / "store.zarr")]["damaged"]) == 1
    table = answer("verify", run).stdout
    assert "store repair" in table
    assert "3 damaged" in table
    assert not kd.verify(run).ok


def test_files_of_an_older_kdpipe_are_counted(run):
    (run / "teacher" / SUMS).unlink()
    verdict = kd.verify(run)
    assert verdict.ok
    assert sorted(path.name for path in verdict.unchecked) == ["job.json", "model.onnx"]
    assert "2 files have no sum, because an older kdpipe wrote them" in answer("verify", run).stdout


def test_unfinished_stores_exit_3_and_stores_are_verified_alone(run, store_maker):
    made = store_maker("half.zarr", fill=False)
    made.fill(made.units[:1])
    assert answer("verify", made.path).exit_code == 3
    assert answer("verify", run / "store.zarr").exit_code == 0


def test_a_folder_in_use_or_of_something_else_is_refused(run, tmp_path):
    with exclusive(run, run / ".kdpipe.lock"):
        assert "is in use by process" in answer("verify", run).stderr
    (tmp_path / "photos").mkdir()
    assert "neither a run folder nor a store" in answer("verify", tmp_path / "photos").stderr
