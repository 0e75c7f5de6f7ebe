"""Tests of loading untrusted weights files and of digests."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.weights.state_dict import count_parameters, load_weights, state_sha256, weights_sha256


class Touch:
    """An object that creates a file when unpickled, as a malicious pickle might."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def network(seed: int = 0, name: str = "cnn", **args: Any) -> nn.Module:
    config = ModelConfig(name=name, args=args or ({"width": 4} if name == "cnn" else {}))
    return build_model(config, num_classes=10, in_channels=1, image_size=(8, 8), seed=seed)


def renamed(entries: dict[str, Tensor], pattern: str, name: str) -> dict[str, Tensor]:
    return {re.sub(pattern, name, key): tensor for key, tensor in entries.items()}


def refused(path: Path, *sentences: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_weights(network(), path)
    assert [sentence for sentence in (str(path), *sentences) if sentence not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_safetensors(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert weights_sha256(target) == weights_sha256(source)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_torch_state_dicts(tmp_path: Path, nest: str | None, prefix: str, legacy: bool) -> None:
    source, target = network(1), network(2)
    entries = OrderedDict((prefix + key, tensor) for key, tensor in source.state_dict().items())
    content = {nest: entries, "epoch": 3, "optimizer": {"state": {}}} if nest else entries
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    load_weights(target, tmp_path / "w.pt")
    assert weights_sha256(target) == weights_sha256(source)


def test_wide_resnets_of_the_reference_code(tmp_path: Path) -> None:
    """RepDistiller saves {"epoch", "model", "best_acc"} and calls `layer1.0.shortcut` `block1.layer.0.convShortcut`."""
    source, target = network(1, "wrn_16_2"), network(2, "wrn_16_2")
    entries = renamed(source.state_dict(), r"^layer(\d)\.(\d+)\.", r"block\1.layer.\2.")
    entries = renamed(entries, r"\.shortcut\.", ".convShortcut.")
    assert not any(key.startswith("layer") or ".shortcut." in key for key in entries)
    torch.save({"epoch": 240, "model": entries, "best_acc": torch.tensor(75.6)}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert weights_sha256(target) == weights_sha256(source)


ONE, OTHER = network(1).state_dict(), network(3).state_dict()


def with_prefix(prefix: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in entries.items()}


BOTH = {**with_prefix("module.student.", ONE), **with_prefix("module.teacher.", OTHER)}
LIGHTNING = {**with_prefix("model.", ONE), "loss.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "key", "notice"),
    [
        ({"net": ONE, "acc": 93.1}, None, "the weights under 'net' are taken."),
        ({"teacher": ONE}, None, "the weights under 'teacher' are taken."),
        ({"model_ema": ONE, "best": torch.ones(1)}, None, "the weights under 'model_ema' are taken."),
        (with_prefix("base.", ONE), None, "the weights under 'base' are taken."),
        ({"state_dict": LIGHTNING}, None, "under 'state_dict.model' are taken, and the other entries (1) are left"),
        (
            {"state_dict": ONE, "state_dict_ema": OTHER},
            None,
            "has 'state_dict_ema' (model.weights_key chooses)",
        ),
        ({"state_dict": OTHER, "state_dict_ema": ONE}, "state_dict_ema", "under 'state_dict_ema' are taken."),
        ({"model": BOTH}, "model.module.student", "under 'model.module.student' are taken, and "),
        ({"state_dict": ONE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, None, None),
    ],
)
def test_what_fits_is_taken_and_told(tmp_path: Path, content: object, key: str | None, notice: str | None) -> None:
    torch.save(content, tmp_path / "w.pt")
    target, notices = network(2), list[str]()
    load_weights(target, tmp_path / "w.pt", weights_key=key, notify=notices.append)
    assert state_sha256(target.state_dict()) == state_sha256(ONE)
    assert len(notices) == (notice is not None)
    assert (notice or "") in "".join(notices)


@pytest.mark.parametrize(
    ("content", "key", "sentence"),
    [
        ({"model": BOTH}, None, "networks that fit the model, 'model.module.student', 'model.module.teacher': choose"),
        ({"teacher": ONE, "student": OTHER}, None, "several networks that fit the model, 'teacher', 'student'"),
        ({"state_dict": ONE}, "ema", "no weights under model.weights_key = 'ema'; keys: 'state_dict'."),
        ({"net": with_prefix("x.", {**ONE, "more": torch.ones(1)})}, None, "unexpected more (under 'net.x')"),
        (
            ONE | {"fc.weight": torch.ones(7, 32), "fc.bias": torch.ones(7)},
            None,
            "model.fresh_head = true for a new classifier",
        ),
    ],
)
def test_what_does_not_fit_is_described(tmp_path: Path, content: object, key: str | None, sentence: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=re.escape(sentence)):
        load_weights(network(2), tmp_path / "w.pt", weights_key=key)


@pytest.mark.parametrize(
    "entries",
    [
        ONE | {"fc.weight": torch.ones(7, 32), "fc.bias": torch.ones(7)},
        {key: value for key, value in ONE.items() if not key.startswith("fc")},
        ONE,
    ],
    ids=["other classes", "no classifier", "as many classes"],
)
def test_a_fresh_head_is_drawn_from_the_seed(tmp_path: Path, entries: dict[str, Tensor]) -> None:
    torch.save(entries, tmp_path / "w.pt")
    target, fresh, notices = network(2), network(2), list[str]()
    load_weights(target, tmp_path / "w.pt", fresh_head=10, notify=notices.append)
    head = {"fc.weight", "fc.bias"}
    for name, value in target.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name] if name in head else ONE[name]), name
    assert notices == [f"{tmp_path / 'w.pt'}: the classifier (fc.weight, fc.bias) is new, drawn from the seed."]


def test_a_classifier_that_is_not_needed_is_left_out(tmp_path: Path) -> None:
    config = ModelConfig(name="resnet8", weights=str(tmp_path / "whole.safetensors"))
    whole = network(1, "resnet8")
    save_file(whole.state_dict(), config.weights)
    said: list[str] = []
    shape: dict[str, Any] = {"in_channels": 1, "image_size": (8, 8), "seed": 0}
    headless = build_model(config, num_classes=0, **shape, notify=said.append)
    assert headless.state_dict().keys() == whole.state_dict().keys() - {"fc.weight", "fc.bias"}
    assert torch.equal(headless.state_dict()["conv1.weight"], whole.state_dict()["conv1.weight"])
    assert said == [f"{config.weights}: the classifier (fc.bias, fc.weight) is left out."]
    save_file(network(1, "resnet14").state_dict(), config.weights)  # more layers, below names that resnet8 has
    with pytest.raises(ModelError, match="unexpected layer1.1"):
        build_model(config, num_classes=0, **shape)


def test_a_torchscript_file_is_refused_as_a_program(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "w.pt"))
    refused(tmp_path / "w.pt", "is a TorchScript file: a program, not weights alone")


def test_a_model_may_itself_have_a_module_called_module(tmp_path: Path) -> None:
    source, target = (nn.Sequential(OrderedDict(module=nn.Linear(2, 2))) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert weights_sha256(target) == weights_sha256(source)


def test_old_files_count_no_batches(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    entries = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    save_file(entries, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert weights_sha256(target) == weights_sha256(source)


def test_entries_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    entries = network(1).state_dict() | {"fc.weight": torch.zeros(100, 32), "extra": torch.zeros(1)}
    del entries["fc.bias"]
    torch.save(entries, tmp_path / "w.pt")
    model = network(2)
    before = weights_sha256(model)
    with pytest.raises(ModelError) as caught:
        load_weights(model, tmp_path / "w.pt")
    assert "missing fc.bias; unexpected extra; fc.weight is stored as [100, 32], wanted [10, 32]." in str(caught.value)
    assert weights_sha256(model) == before


def test_of_many_misfits_the_first_few_are_named(tmp_path: Path) -> None:
    torch.save(network(0, "mlp").state_dict(), tmp_path / "w.pt")
    refused(
        tmp_path / "w.pt", "missing stage1.0.weight, stage1.1.weight, stage1.1.bias and 17 more; unexpected layer1.0"
    )


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    torch.save(network().state_dict() | {"fc.bias": [10]}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "fc.bias is stored as no tensor, wanted [10]")


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    marker, path = tmp_path / "was_here", tmp_path / "w.pt"
    content = {"weight": Touch(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    refused(path, "holds ", "kdpipe loads only tensors")
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))  # the control: it would have run
    assert marker.exists()


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"model": {"w": torch.ones(1)}, "best": np.float64(1.0)}])
def test_pickled_objects_are_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    found = (
        "pickled objects (torch.nn.modules.linear.Linear)" if isinstance(content, nn.Module) else "multiarray.scalar"
    )
    refused(tmp_path / "w.pt", found, "save model.state_dict() alone, or convert it to safetensors.")


@pytest.mark.parametrize("content", [b"", b"hello, these are no weights", b"PK\x03\x04 half a zip"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    refused(tmp_path / "w.pt", "is damaged or no torch state dict")
    (tmp_path / "w.safetensors").write_bytes(content)
    refused(tmp_path / "w.safetensors", "cannot be read as safetensors (")


def test_a_truncated_file(tmp_path: Path) -> None:
    for name in ("w.pt", "w.safetensors"):
        path = tmp_path / name
        torch.save(network().state_dict(), path) if name == "w.pt" else save_file(network().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-100])
        refused(path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"epoch": 3}, torch.ones(2), {0: "a"}])
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "holds no state dict")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    refused(tmp_path / "w.pt", "there is no weights file")
    refused(tmp_path, "there is no weights file")


def test_the_digest_is_of_names_types_shapes_and_bytes() -> None:
    """Spelled out, for stores keep it for years: it must not change with the code."""
    model = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        model[0].bias.fill_(3.0)
    spelled = b'["0.bias", "torch.float32", [1]]' + np.array([3], "<f4").tobytes()
    spelled += b'["0.weight", "torch.float32", [1, 2]]' + np.array([1, 2], "<f4").tobytes()
    assert weights_sha256(model) == hashlib.sha256(spelled).hexdigest()


def test_the_digest_does_not_depend_on_the_order_of_entries() -> None:
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    one = nn.Sequential(OrderedDict(linear=linear, norm=norm))
    other = nn.Sequential(OrderedDict(norm=norm, linear=linear))
    assert list(one.state_dict()) != list(other.state_dict())
    assert weights_sha256(one) == weights_sha256(other)


@pytest.mark.parametrize("entry", ["fc.weight", "fc.bias", "stage1.1.running_var"])
def test_the_digest_sees_one_changed_number(entry: str) -> None:
    model = network()
    before = weights_sha256(model)
    flat = model.state_dict()[entry].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    assert weights_sha256(model) != before


def test_digest_depends_on_types_and_shapes_not_layouts() -> None:
    model = network()
    assert weights_sha256(network().to(memory_format=torch.channels_last)) == weights_sha256(model)
    assert len({weights_sha256(network().to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}) == 3
    wide, tall = (nn.Linear(*shape, bias=False).requires_grad_(False) for shape in ((2, 3), (3, 2)))
    for linear in (wide, tall):
        linear.weight.zero_()
    assert weights_sha256(wide) != weights_sha256(tall)


def test_count_parameters_skips_buffers_and_duplicates() -> None:
    linear = nn.Linear(2, 3)
    model = nn.Sequential(linear, nn.BatchNorm1d(3), linear)
    linear.weight.requires_grad_(False)
    assert count_parameters(model) == 6 + 3 + 3 + 3
