"""Several compressions of one student: none overwrites the files of another."""

import pytest
import torch
from support.device import DEVICE
from torch.utils.data import TensorDataset

import kdpipe as kd
from kdpipe.stages.compress import compress
from kdpipe.stages.training import preflight

QUIET = {"device": DEVICE, "progress": False}
ONE = {"epochs": 1, "batch_size": 32}
FAST = {"latency_rounds": 3, "niceness": 0, **QUIET}


def noise(num, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (num, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return kd.as_image_set(TensorDataset(images, torch.arange(num) % 3), "train" if seed == 0 else "test")


@pytest.fixture(scope="module", autouse=True)
def _untried():
    """Write every ONNX file, and try none before: that is half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (preflight, compress):
            patch.setattr(module, "try_export", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressions")
    train, test = noise(64, 0), noise(32, 1)
    teacher = kd.create_model("cnn", train, width=4)
    store = kd.cache_teacher(teacher, train, folder / "store.zarr", normalize=(0.5, 0.5), **QUIET)
    return kd.train_student("cnn", train, store, test=test, model_args={"width": 4}, run=folder / "run", **ONE, **QUIET)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_compressions_keep_each_others_files(student):
    prune = {"round_to": 1, "train": ONE, **QUIET}
    calls = {
        "both": lambda: kd.compress(
            student, prune={"ratio": 0.3, "round_to": 1}, prune_train=ONE, quantize_train=ONE, **FAST
        ),
        "pruned": lambda: kd.prune(student, ratio=0.3, **prune),
        "pruned more": lambda: kd.compress(
            student, prune={"ratio": 0.6, "round_to": 1}, int8=False, prune_train=ONE, **FAST
        ),
        "quantized": lambda: kd.quantize(student, train=ONE, **QUIET),
    }
    results = {name: call() for name, call in calls.items()}
    before = {name: contents(result.folder.parent) for name, result in results.items()}
    assert results["both"].folder == student.job.run / "compressed" / "artifacts-seed0"
    assert len({result.folder for result in results.values()}) == 4
    for name, call in calls.items():
        assert call().folder == results[name].folder
    assert {name: contents(result.folder.parent) for name, result in results.items()} == before
    images = torch.zeros(2, 1, 6, 6, dtype=torch.uint8)
    for result in results.values():
        assert result.num_bytes > 0
        assert result.bundle(images).shape == (2, 3)
        assert kd.evaluate(result.model, student.job.test_set, device=DEVICE).top1 == pytest.approx(result.accuracy)
    rows = {name: [row.kind for row in kd.report(result).rows] for name, result in results.items()}
    assert {name: kinds[-1] for name, kinds in rows.items()} == {
        "both": "int8",
        "pruned": "pruned",
        "pruned more": "pruned",
        "quantized": "int8",
    }
    assert [row.kind for row in kd.report(student).rows] == rows["both"]
    with pytest.raises(kd.KdpipeError, match="call report without html"):
        kd.report(results["pruned"], html="page.html")


def test_a_chosen_folder_is_used_and_not_overwritten(student, tmp_path):
    prune = {"round_to": 1, "train": ONE, "folder": tmp_path / "mine", **QUIET}
    result = kd.prune(student, ratio=0.3, **prune)
    assert result.folder == tmp_path / "mine" / "artifacts-seed0"
    before = contents(tmp_path / "mine")
    with pytest.raises(kd.FingerprintMismatch, match=r"prune.ratio: stored 0.3, wanted 0.5. Name another folder"):
        kd.prune(student, ratio=0.5, **prune)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    with pytest.raises(kd.KdpipeError, match="has files of others"):
        kd.prune(student, ratio=0.5, **{**prune, "folder": tmp_path / "full"})
    assert contents(tmp_path / "mine") == before


def test_other_stores_have_a_folder_of_their_own(student, tmp_path):
    train = student.job.train_set
    store = kd.cache_teacher(
        kd.create_model("cnn", train, width=4, seed=1), train, tmp_path / "o.zarr", normalize=(0.5, 0.5), **QUIET
    )
    prune = {"ratio": 0.4, "round_to": 1, "train": ONE, **QUIET}
    first, second = kd.prune(student, **prune), kd.prune(student, train, store, **prune)
    assert first.folder != second.folder
    assert kd.prune(student, train, student.job.places[0], **prune).folder == first.folder
