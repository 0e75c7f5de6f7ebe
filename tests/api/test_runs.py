"""The run folders of students."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.device import DEVICE

import kdpipe as kd
from kdpipe.stages.training.job_dir import read_json_file, write_json_file

pytestmark = pytest.mark.usefixtures("without_onnx")


def test_students_of_a_run_differ_in_seeds_only(tmp_path: Path) -> None:
    train, test = kd.load_dataset("digits", num_train=64, test_share=0.1)
    settings = {"test": test, "epochs": 0, "device": DEVICE, "progress": False, "run": tmp_path}
    kd.train_student("mlp", train, **settings)
    recipe = read_json_file(tmp_path / "recipe.json") or {}
    del recipe["student"]["train"]["sampler"], recipe["student"]["image_size"]  # as in a version without these keys
    write_json_file(tmp_path / "recipe.json", recipe)
    kd.train_student("mlp", train, seed=1, **settings)
    with pytest.raises(kd.FingerprintMismatch, match=r"student.train.lr: .*seeds only"):
        kd.train_student("mlp", train, seed=2, lr=0.5, **settings)


def test_validation_images_decide_in_python_too(tmp_path: Path) -> None:
    train, validation, test = kd.load_dataset("digits", num_train=100, validation_share=0.2, test_share=0.1)
    own = {"test": test, "validation": validation, "device": DEVICE, "progress": False}
    teacher = kd.train_teacher(kd.create_model("mlp", train), train, epochs=1, run=tmp_path / "t", **own)
    assert [line["split"] for line in teacher.history] == ["validation"]
    store = kd.cache_teacher(teacher, train, tmp_path / "s.zarr", **own)
    weights = {"teachers": {"weights": "accuracy"}, "export": False}
    student = kd.train_student("mlp", train, store, epochs=1, options=weights, run=tmp_path / "s", **own)
    assert student.figures["validation"]["num_images"] == validation.num_samples == 20
    assert kd.report(student).rows[0].validation_mean == 100 * student.figures["validation"]["accuracy"]
    with pytest.raises(kd.FingerprintMismatch, match="validation"):
        kd.train_student(
            "mlp", train, store, epochs=1, options=weights, run=tmp_path / "s", **own | {"validation": None}
        )
    with pytest.raises(kd.KdpipeError, match="test="):
        kd.cache_teacher(teacher, train, tmp_path / "x.zarr", **own | {"test": None})
