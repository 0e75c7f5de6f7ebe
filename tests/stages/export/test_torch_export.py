"""Tests of the torch.export program: same logits, no pickle, no local paths."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from support.tiny_nets import EXAMPLE, build, images
from torch import nn

from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.compress.quantization.qdq_graph import int8_graph
from kdpipe.stages.errors import ModelError
from kdpipe.stages.export import torch_export as torch_program
from kdpipe.stages.export.torch_export import export_program

METADATA = {"normalization": '{"mean":[0.5]}', "class_names": '["cat"]'}


def prepared_network():
    prepared = prepare_qat(build("residual").eval(), EXAMPLE)
    calibrate(prepared, [images(20, seed)[0] for seed in range(3)])
    return prepared.eval()


@pytest.fixture(scope="module")
def networks():
    return {"float": build("residual").eval(), "int8": prepared_network()}


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pt2")
    for kind, model in networks.items():
        export_program(model, EXAMPLE, folder / f"{kind}.pt2", metadata=METADATA)
    return {kind: folder / f"{kind}.pt2" for kind in networks}


def loaded(path):
    found = dict.fromkeys(METADATA, "")
    program = torch.export.load(path, extra_files=found)
    assert found == METADATA
    return program.module()


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_loaded_program_gives_the_same_logits(networks, files, kind):
    program = loaded(files[kind])
    model = int8_graph(networks[kind]) if kind == "int8" else networks[kind]
    with torch.no_grad():
        for num_samples in (1, 7):
            batch = images(num_samples, seed=3)[0]
            torch.testing.assert_close(program(batch), model(batch))


def test_int8_program_agrees_and_stores_integers(networks, files):
    program, batch = loaded(files["int8"]), images(200, seed=50)[0]
    with torch.no_grad():
        agreeing = program(batch).argmax(dim=1) == networks["int8"](batch).argmax(dim=1)
    assert agreeing.double().mean() >= 0.98
    weights = {name: tensor.dtype for name, tensor in program.state_dict().items() if name.endswith("weights.weight")}
    assert len(weights) == 9 and set(weights.values()) == {torch.int8}


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_program_has_no_pickle_and_no_local_paths(files, kind):
    with zipfile.ZipFile(files[kind]) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    config = json.loads(contents["archive/data/weights/model_weights_config.json"])["config"]
    raw = {f"archive/data/weights/{weight['path_name']}" for weight in config.values() if not weight["use_pickle"]}
    assert len(raw) == len(config) > 20
    for name, content in contents.items() - {(name, contents[name]) for name in raw}:
        assert not content.startswith((b"\x80", b"PK")), name  # a pickle, or a zip that holds one
        assert not any(trace in content for trace in (b".py", b"site-packages", b"File ", b"stack_trace", b"/tmp"))


def test_equal_networks_give_equal_bytes(files, tmp_path):
    again = prepared_network().train().requires_grad_(False)
    export_program(again, torch.ones(4, 3, 8, 8), tmp_path / "again.pt2", metadata=METADATA)
    assert (tmp_path / "again.pt2").read_bytes() == files["int8"].read_bytes()
    assert again.training


def test_export_is_silent_and_leaves_network_unchanged(tmp_path, capfd):
    model, captured = build("plain").train(), []
    model.fc.register_forward_hook(lambda *_: captured.append(1))
    export_program(model, EXAMPLE, tmp_path / "model.pt2")
    assert capfd.readouterr() == ("", "")
    assert model.training and not captured
    assert all(parameter.requires_grad for parameter in model.parameters())


class BatchOfTwo(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("model", "sentence"), [(BatchOfTwo(), "hard-codes the batch size"), (Deciding(), r"\w+: .+")])
def test_failed_export_keeps_the_earlier_file(model, sentence, tmp_path, capfd):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"earlier")
    with pytest.raises(ModelError, match=rf"as a torch program for inputs \[batch, 3, 8, 8\]: .*{sentence}") as raised:
        export_program(model, EXAMPLE, path)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"earlier"
    assert capfd.readouterr() == ("", "")


def test_unwritable_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"earlier")
    with pytest.raises(ModelError, match=r"file/model.pt2 cannot be written: Not a directory\."):
        export_program(nn.Flatten(), EXAMPLE, tmp_path / "file" / "model.pt2")

    def refuse(_path, *_parts):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(torch_program, "write_with_sum", refuse)
    with pytest.raises(ModelError, match=r"file cannot be written: PermissionError: Permission denied\."):
        export_program(nn.Flatten(), EXAMPLE, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"earlier"
