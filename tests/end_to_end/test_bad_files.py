"""Invalid and hostile input files: commands report them in one sentence, run no code in them, and change nothing."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from support.invalid_files import ESCAPE, PLACES, Touch, answer, put, refused


@pytest.fixture
def run(done, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(done[0], tmp_path / "run"))


# Recipes


RECIPES = {
    "bytes": (os.urandom(100) + b"\xff", "is not valid TOML"),
    "utf-16": ('name = "x"'.encode("utf-16"), "is not valid TOML"),
    "zero byte": (b'name = "x"\n\0', "is not valid TOML"),
    "a key twice": (b'name = "x"\nname = "y"', "Cannot overwrite a value"),
    "100 MB": (b"# " + b"x" * 10**8, "is not a recipe: it is larger than"),
    "nested": (b"a=" + b"[" * 3000, "is not valid TOML"),
    "nested tables": (b"[" + b".".join([b"a"] * 5000) + b"]", "is not a recipe: its nesting"),
    "a key without end": (b'name = "x"\n[data]\n' + b"k" * 10**5 + b" = 1", "unknown key 'data.kkk"),
    "keys without end": (b"".join(b"k%d = 1\n" % number for number in range(3000)), "is missing"),
    "escape sequence": (b'name = "\\u001b[31m\\u202e"', "name = \\x1b[31m\\u202e: it does not match"),
    "nothing": (b"", "the key 'name' is missing"),
    "folder": ("folder", "Is a directory"),
    "pipe": ("pipe", "the key 'name' is missing"),
    "circle": ("circle", "Too many levels of symbolic links"),
    "passwords": ("passwords", "is not valid TOML"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_invalid_recipe_files_are_refused(tmp_path, case):
    content, sentence = RECIPES[case]
    put(tmp_path / "r.toml", content)
    assert sentence in refused("run", tmp_path / "r.toml", "--run", tmp_path / "run", code=2)
    checked = answer("recipe", "check", tmp_path / "r.toml")
    assert checked.exit_code == 2
    assert isinstance(checked.exception, SystemExit)
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.parametrize("rewrite", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_recipe_may_have_bom_and_crlf(recipe, tmp_path, rewrite):
    (tmp_path / "r.toml").write_bytes(rewrite(recipe.read_text()).encode())
    assert answer("recipe", "check", tmp_path / "r.toml").exit_code == 0


# Weights


def safetensors(header, data=b"", num_bytes=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if num_bytes is None else num_bytes) + text + data


def tensor(start, end, **other):
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, end], **other}


def changed(state, name, change):
    return {**state, name: change(state[name])}


def packed(content, path):
    """A torch file whose zip is compressed."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, raw in members.items():
            small.writestr(name, raw)


SAFETENSORS = {
    "header without end": (lambda _: safetensors({}, num_bytes=2**62), "cannot be read as safetensors"),
    "overlap": (lambda _: safetensors({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)), "cannot be read as"),
    "outside": (lambda _: safetensors({"a": tensor(0, 2**40)}, bytes(8)), "cannot be read as"),
    "huge": (lambda _: safetensors({"a": tensor(0, 8, shape=[2**40, 2**40])}, bytes(8)), "cannot be read as"),
    "unknown type": (lambda _: safetensors({"a": tensor(0, 8, dtype="Q9")}, bytes(8)), "cannot be read as"),
    "truncated": (lambda state: save(state)[:-100], "cannot be read as safetensors"),
    "a pickle": (lambda _: pickle.dumps({"a": 1}), "cannot be read as safetensors"),
    "text": (lambda _: b"weights", "cannot be read as safetensors"),
    "integers": (
        lambda state: save({name: one.int() for name, one in state.items()}),
        "stage1.0.weight is stored as int32, wanted float32",
    ),
    "NaN": (lambda state: save(changed(state, "fc.bias", lambda one: one * torch.nan)), "fc.bias holds NaN"),
    "too large": (
        lambda state: save(changed(state, "fc.bias", lambda one: one.double() + 1e300)),
        "fc.bias holds NaN or infinity",
    ),
    "variance below zero": (
        lambda state: save(changed(state, "stage1.1.running_var", lambda one: -one)),
        "stage1.1.running_var holds a variance below zero",
    ),
    "other shape": (
        lambda state: save(changed(state, "fc.bias", lambda one: one[:3].clone())),
        "fc.bias is stored as [3], wanted [10]",
    ),
    "one missing": (lambda state: save({k: v for k, v in state.items() if k != "fc.bias"}), "missing fc.bias"),
    "one more": (lambda state: save(state | {ESCAPE + "x" * 10**5: torch.ones(1)}), "unexpected ?[31m?<script>xxx"),
    **{place: (lambda _, place=place: place, "") for place in PLACES},
}


@pytest.fixture(scope="module")
def state(done):
    return load_file(done[0] / "teacher" / "model.safetensors")


def with_weights(recipe, tmp_path, path):
    return ("train-teacher", recipe, "--run", tmp_path / "new", "--set", f"teacher.model.weights={path}")


@pytest.mark.parametrize("case", SAFETENSORS)
def test_invalid_weights_are_refused_before_training(recipe, tmp_path, state, case):
    make, sentence = SAFETENSORS[case]
    put(tmp_path / "w.safetensors", make(state))
    output = refused(*with_weights(recipe, tmp_path, tmp_path / "w.safetensors"))
    assert sentence in output
    assert "w.safetensors" in output
    assert not list(tmp_path.glob("new/teacher/*"))


TORCH = {
    "compressed": (lambda _, path: packed({"fc.bias": torch.zeros(10**6)}, path), "is compressed or has"),
    "sparse": (lambda one, path: torch.save({k: v.to_sparse() for k, v in one.items()}, path), "a sparse tensor"),
    "without data": (lambda one, path: torch.save({k: v.to("meta") for k, v in one.items()}, path), "a meta tensor"),
    "complex": (
        lambda one, path: torch.save(changed(one, "fc.bias", lambda bias: bias * 1j), path),
        "fc.bias is stored as complex64, wanted float32",
    ),
    "an ONNX file": (lambda one, path: put(path, b"\x08\x08\x12\x07pytorch"), "pickle that torch did not write"),
    "a module": (lambda one, path: torch.save(torch.nn.Linear(2, 2), path), "pickled objects"),
    "itself": (lambda one, path: put(path, pickle.dumps([[]] * 5, 4)), "w.pt"),
}


@pytest.mark.parametrize("case", TORCH)
def test_torch_files_without_weights_are_refused_quietly(recipe, tmp_path, state, case):
    make, sentence = TORCH[case]
    make(state, tmp_path / "w.pt")
    assert sentence in refused(*with_weights(recipe, tmp_path, tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("command", ["train-teacher", "compress"])
def test_a_payload_in_weights_does_not_run(recipe, run, tmp_path, command, name):
    marker, path = tmp_path / "was_here", tmp_path / name
    path.write_bytes(pickle.dumps({"fc.bias": Touch(marker)}))
    if command == "compress":
        output = refused("compress", recipe, "--run", run, "--from", path)
    else:
        output = refused(*with_weights(recipe, tmp_path, path))
    assert name in output
    assert not marker.exists()


@pytest.mark.parametrize(
    ("record", "change", "sentence"),
    [
        ("{}", lambda state: changed(state, "fc.bias", lambda one: one * torch.inf), "fc.bias holds NaN or infinity"),
        ("{}", lambda state: {"x": torch.ones(1)}, "unexpected x"),
        ('{"architecture": null}', dict, "has no valid architecture"),
        ('{"architecture": {"quantized": "\\u001b[31m"}}', dict, "is already quantized"),
        ("[" * 10**5, lambda state: {}, "missing"),
    ],
)
def test_an_invalid_external_student_is_refused(recipe, run, tmp_path, record, change, sentence):
    student = load_file(run / "students" / "distilled-seed0" / "model.safetensors")
    (tmp_path / "s.safetensors").write_bytes(save(change(student), metadata={"kdpipe": record}))
    assert sentence in refused("compress", recipe, "--run", run, "--from", tmp_path / "s.safetensors")


# Data, and code of the user's own


IMAGES, LABELS = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10

ARRAYS = {
    "negative": ({"labels": LABELS - 2}, "has the label -2"),
    "10**9 classes": ({"labels": LABELS + 10**9}, "is too large"),
    "beyond int64": ({"labels": np.full(20, 2**64 - 1, np.uint64)}, "labels must fit int64"),
    "NaN": ({"images": IMAGES * np.nan}, "images must be uint8"),
    "one side": ({"images": IMAGES[:, 0, 0]}, "images must be [N, H, W]"),
    "no side": ({"images": IMAGES[:, :0]}, "no side 0, found uint8 [20, 0, 8]"),
    "too few": ({"labels": LABELS[:3]}, "labels must be integers [20]"),
    "no sample": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "has no sample"),
    "text": ({"labels": np.array(["x"] * 20)}, "labels must be integers"),
    "classes": ({"classes": np.array([ESCAPE])}, "outside 0..0"),
}


def trained_on(recipe, tmp_path, data):
    return "train-teacher", recipe, "--run", tmp_path / "run", "--set", f'data={{name = "{data}"}}'


@pytest.mark.parametrize("case", ARRAYS)
def test_invalid_npz_data_is_refused(recipe, tmp_path, case):
    arrays, sentence = ARRAYS[case]
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", **({"images": IMAGES, "labels": LABELS} | arrays))
    assert sentence in refused(*trained_on(recipe, tmp_path, f"npz:{tmp_path}"))


def test_pickles_and_zip_bombs_in_npz_are_refused(recipe, tmp_path):
    marker = tmp_path / "was_here"
    np.savez(tmp_path / "a.npz", images=np.array([Touch(marker)] * 20, dtype=object), labels=LABELS)
    assert "objects are never unpickled" in refused(*trained_on(recipe, tmp_path, f"npz:{tmp_path}/a.npz"))
    with (
        zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as bomb,
        (tmp_path / "labels.npy").open("wb") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**45, 8, 8)})
        file.write(bytes(10**6))
        file.flush()
        for name in ("images.npy", "labels.npy"):
            bomb.write(tmp_path / "labels.npy", name)
    assert "bytes, but 1000000 are stored" in refused(*trained_on(recipe, tmp_path, f"npz:{tmp_path}/b.npz"))
    for what in (*PLACES, "", pickle.dumps(Touch(marker))):
        put(tmp_path / "c.npz", what)
        assert "c.npz" in refused(*trained_on(recipe, tmp_path, f"npz:{tmp_path}/c.npz"))
    assert not marker.exists()


MODULES = {
    "raises": f"raise RuntimeError({ESCAPE!r})",
    "ends as if done": "raise SystemExit",
    "ends": "import sys\nsys.exit(75)",
    "is no Python": "def made(:",
    "has nothing": "",
    "has no function": "made = 5",
    "makes nothing": "def made(*split):\n    return None",
    "ends later": "def made(*split):\n    raise SystemExit(0)",
    "without end": "def made(*split):\n    return made(*split)",
}


@pytest.mark.parametrize("key", ["data", "teacher.model"])
@pytest.mark.parametrize("case", MODULES)
def test_failing_user_code_is_one_sentence(recipe, tmp_path, monkeypatch, key, case):
    module = f"theirs_{key[:1]}_{list(MODULES).index(case)}"
    (tmp_path / f"{module}.py").write_text(MODULES[case])
    monkeypatch.syspath_prepend(tmp_path)
    override = f"{key}={{name = 'python:{module}:made'}}"
    output = refused("train-teacher", recipe, "--run", tmp_path / "run", "--set", override)
    assert module in output


def test_output_of_user_code_is_not_in_the_results(recipe, tmp_path, monkeypatch):
    (tmp_path / "theirs_prints.py").write_text(
        "from torch import nn\nprint('here I am')\n"
        "def made(num_classes):\n    print('and here')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    override = "teacher.model={name = 'python:theirs_prints:made'}"
    ended = answer("train-teacher", recipe, "--run", tmp_path / "run", "--json", "--set", override)
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["teacher"]["num_epochs"] == 6
    assert "here I am" in ended.stderr


# ONNX files


@pytest.mark.parametrize("what", [*PLACES, "", "text", b"\x80\x04]\x94.", "gone"])
def test_bench_refuses_invalid_onnx_files(tmp_path, what):
    if what != "gone":
        put(tmp_path / "m.onnx", what)
    assert "m.onnx" in refused("bench", tmp_path / "m.onnx", "--rounds", 3)
