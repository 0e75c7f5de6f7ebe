"""Tests of compressing students that are given as files, hostile ones included."""

import dataclasses

import pytest
import torch
from support.tiny_compression import CONFIG, compressed, exported

from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import compressed_root
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store import FingerprintMismatch


def test_external_student_is_compressed_in_its_own_folder(run, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    state = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")[0]
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "external.pt")
    config = dataclasses.replace(CONFIG, student=str(tmp_path / "external.pt"))
    figures = compressed(copy, run, config)
    assert compressed_root(copy, config).name == "compressed-external"
    given = read_json_file(copy / "compressed-external" / "given" / "result.json")
    assert given["accuracy"] == read_json_file(run / "students" / "distilled-seed0" / "result.json")["accuracy"]
    assert figures["int8"] == compressed(copy, run, config)["int8"]


def test_bf16_student_passes_through_unchanged(run, copy, tmp_path):
    state = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")[0]
    bf16 = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(bf16, tmp_path / "narrow.pt")
    config = dataclasses.replace(CONFIG, student=str(tmp_path / "narrow.pt"), steps=())
    assert compressed(copy, run, config) == {}
    stored = load_tensors(exported(copy, run, config) / "student" / "model.safetensors")[0]
    assert stored.keys() == bf16.keys()
    assert all(stored[name].dtype == bf16[name].dtype and torch.equal(stored[name], bf16[name]) for name in bf16)


def test_pruned_external_student_is_pruned_further(run, own, monkeypatch):
    student_file = exported(own, run, dataclasses.replace(CONFIG, steps=("prune",))) / "pruned" / "model.safetensors"
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    config = dataclasses.replace(CONFIG, student=str(student_file), steps=("prune",))
    again = compressed(own, run, config)["pruned"]
    assert (
        again["num_parameters"] < read_json_file(own / "compressed" / "pruned-seed0" / "result.json")["num_parameters"]
    )


def test_files_of_other_networks_are_refused(run, made, copy, tmp_path):
    quantized = made / "compressed" / "artifacts-seed0" / "int8" / "model.safetensors"
    for path, kind, sentence in (
        (quantized, ModelError, "is already quantized"),
        (tmp_path / "absent.pt", ModelError, "there is no weights file"),
        (run / "teacher" / "model.safetensors", FingerprintMismatch, "args.width: stored 8, wanted 4"),
    ):
        with pytest.raises(kind, match=sentence):
            compressed(copy, run, dataclasses.replace(CONFIG, student=str(path)))
    tensors, record = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")
    save_tensors(tmp_path / "other.safetensors", tensors, record | {"class_names": ["x", "y", "z", "u"]})
    with pytest.raises(FingerprintMismatch, match="class_names"):
        compressed(copy, run, dataclasses.replace(CONFIG, student=str(tmp_path / "other.safetensors")))


def test_python_model_needs_trust_python(tmp_path):
    architecture = {"model": "python:os:system", "args": {}, "num_classes": 2, "in_channels": 1, "image_size": [8, 8]}
    record = {"architecture": architecture, "normalization": {"mean": [0.0], "std": [1.0]}}
    save_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(1)}, record)
    with pytest.raises(ModelError, match="pass trust_python=True"):
        rebuild(tmp_path / "model.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1j])
def test_non_finite_weights_are_refused(run, copy, tmp_path, value):
    state = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")[0]
    state["fc.bias"] = state["fc.bias"] * value
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ModelError, match=r"fc\.bias (holds NaN or infinity|is stored as complex64)"):
        exported(copy, run, dataclasses.replace(CONFIG, student=str(tmp_path / "broken.pt"), steps=()))


@pytest.mark.parametrize("architecture", ["x", [1, 2], None, 5, {"widths": "x"}])
def test_invalid_headers_are_refused(run, copy, tmp_path, architecture):
    tensors, record = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")
    own = record["architecture"] | architecture if isinstance(architecture, dict) else architecture
    save_tensors(tmp_path / "odd.safetensors", tensors, record | {"architecture": own})
    with pytest.raises(ModelError, match="has no valid architecture"):
        compressed(copy, run, dataclasses.replace(CONFIG, student=str(tmp_path / "odd.safetensors")))


@pytest.mark.parametrize(
    "change",
    [
        {"args": {"width": 10**12}},
        {"num_classes": 10**13},
        {"num_classes": -1},
        {"image_size": [10**6, 10**6]},
        {"quantized": "int3"},
        {"quantized": "int8", "exclude": "fc"},
        {"widths": [1]},
        {"removed_blocks": ["stage1.3", "fc.weight"]},
        {"ranks": {"fc": 10**12}},
        {"ranks": ["fc"]},
    ],
    ids=str,
)
def test_hostile_records_are_not_built(run, tmp_path, change):
    tensors, record = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")
    record["architecture"] |= change
    save_tensors(tmp_path / "hostile.safetensors", tensors, record)
    with pytest.raises(ModelError) as raised:
        rebuild(tmp_path / "hostile.safetensors")
    assert "\n" not in str(raised.value)
