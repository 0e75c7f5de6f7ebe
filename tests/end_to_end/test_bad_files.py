"""Files that users and strangers hand over, damaged, of another kind, or hostile: every command answers in a sentence,
runs nothing that a file brings along, waits for nothing that never comes, and loses nothing: with the good file back in
its place the same command goes on. Stores have their own tests (tests/store/test_hostile_store.py).
"""

import json
import os
import pickle
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from kdpipe_process import kdpipe_here
from safetensors import safe_open
from safetensors.torch import load_file, save

from stages import checkpoint

DEEP = '{"a":' * 10**5 + "1" + "}" * 10**5
ESCAPE = "\x1b[31m\u202e<script>"
WAIT_S = 60


class WaitsForEver(BaseException):
    """No error that a command would turn into a sentence."""


class Touch:
    """Unpickled, it makes a file: a stand-in for what a stranger might do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def no_test_waits_for_ever():
    def end(*_):
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(WAIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(done, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(done[0], tmp_path / "run"))


def refused(*arguments, code=1):
    """What a command says that refuses: one sentence, and nothing half-written."""
    ended = kdpipe_here(*arguments)
    assert isinstance(ended.exception, SystemExit), (arguments, ended.exception)
    assert ended.exit_code == code, (ended.stdout, ended.stderr)
    said = [line for line in ended.stderr.splitlines() if line.startswith("kdpipe: ")]
    assert len(said) == 1, said
    assert said[0].startswith("kdpipe: error: ")
    assert said[0].isprintable()
    assert len(said[0]) < 1000
    assert [word for word in ("Traceback", "Errno", "Warning") if word in ended.stderr] == []
    return said[0]


def put(path, what):
    """Put something else in the place of a file: bytes, text, or what is named."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "circle":
        path.symlink_to(path.name)
    elif what == "zeros":
        path.symlink_to("/dev/zero")
    elif what == "passwords":
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(what if isinstance(what, bytes) else what.encode())


PLACES = ("folder", "pipe", "circle", "zeros", "passwords")
NO_RECORDS = (*PLACES, "", b"\x80\xff\x00", "[]", "null", "{}", DEEP, '{"a": ' + "9" * 10**4 + "}")


# Recipes


RECIPES = {
    "bytes": (os.urandom(100) + b"\xff", "is not valid TOML"),
    "utf-16": ('name = "x"'.encode("utf-16"), "is not valid TOML"),
    "zero byte": (b'name = "x"\n\0', "is not valid TOML"),
    "a key twice": (b'name = "x"\nname = "y"', "Cannot overwrite a value"),
    "100 MB": (b"# " + b"x" * 10**8, "is no recipe: it has more than"),
    "nested": (b"a=" + b"[" * 3000, "is not valid TOML"),
    "nested tables": (b"[" + b".".join([b"a"] * 5000) + b"]", "no recipe is nested"),
    "a key without end": (b'name = "x"\n[data]\n' + b"k" * 10**5 + b" = 1", "unknown key 'data.kkk"),
    "keys without end": (b"".join(b"k%d = 1\n" % number for number in range(3000)), "is missing"),
    "escape sequence": (b'name = "\\u001b[31m\\u202e"', "name = \\x1b[31m\\u202e: string should"),
    "nothing": (b"", "the key 'name' is missing"),
    "folder": ("folder", "Is a directory"),
    "pipe": ("pipe", "the key 'name' is missing"),
    "circle": ("circle", "Too many levels of symbolic links"),
    "passwords": ("passwords", "is not valid TOML"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_what_is_no_recipe_is_refused_and_nothing_is_made_of_it(tmp_path, case):
    content, sentence = RECIPES[case]
    put(tmp_path / "r.toml", content)
    assert sentence in refused("run", tmp_path / "r.toml", "--run", tmp_path / "run", code=2)
    checked = kdpipe_here("recipe", "check", tmp_path / "r.toml")
    assert checked.exit_code == 2
    assert isinstance(checked.exception, SystemExit)
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.parametrize("rewrite", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_recipe_may_come_from_another_systems_editor(recipe, tmp_path, rewrite):
    (tmp_path / "r.toml").write_bytes(rewrite(recipe.read_text()).encode())
    assert kdpipe_here("recipe", "check", tmp_path / "r.toml").exit_code == 0


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
def test_weights_that_are_none_are_refused_before_any_training(recipe, tmp_path, state, case):
    make, sentence = SAFETENSORS[case]
    put(tmp_path / "w.safetensors", make(state))
    said = refused(*with_weights(recipe, tmp_path, tmp_path / "w.safetensors"))
    assert sentence in said
    assert "w.safetensors" in said
    assert not list(tmp_path.glob("new/teacher/*"))


TORCH = {
    "compressed": (lambda _, path: packed({"fc.bias": torch.zeros(10**6)}, path), "unpacks to more than it holds"),
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
def test_torch_files_that_are_no_weights_are_refused_without_a_warning_of_torchs(recipe, tmp_path, state, case):
    make, sentence = TORCH[case]
    make(state, tmp_path / "w.pt")
    assert sentence in refused(*with_weights(recipe, tmp_path, tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("command", ["train-teacher", "compress"])
def test_a_payload_in_weights_does_not_run(recipe, run, tmp_path, command, name):
    marker, path = tmp_path / "was_here", tmp_path / name
    path.write_bytes(pickle.dumps({"fc.bias": Touch(marker)}))
    if command == "compress":
        said = refused("compress", recipe, "--run", run, "--from", path)
    else:
        said = refused(*with_weights(recipe, tmp_path, path))
    assert name in said
    assert not marker.exists()


@pytest.mark.parametrize(
    ("record", "change", "sentence"),
    [
        ("{}", lambda state: changed(state, "fc.bias", lambda one: one * torch.inf), "fc.bias holds NaN or infinity"),
        ("{}", lambda state: {"x": torch.ones(1)}, "unexpected x"),
        ('{"architecture": null}', dict, "does not say what the network is"),
        ('{"architecture": {"quantized": "\\u001b[31m"}}', dict, "is quantized already"),
        ("[" * 10**5, lambda state: {}, "missing"),
    ],
)
def test_a_student_from_elsewhere_is_refused_with_what_is_wrong(recipe, run, tmp_path, record, change, sentence):
    student = load_file(run / "students" / "distilled-seed0" / "model.safetensors")
    (tmp_path / "s.safetensors").write_bytes(save(change(student), metadata={"kdpipe": record}))
    assert sentence in refused("compress", recipe, "--run", run, "--from", tmp_path / "s.safetensors")


# A run's own records


RECORDS = ("recipe.json", "teacher/result.json", "compressed/latency-seed0.json")


@pytest.mark.parametrize("name", RECORDS)
def test_a_report_names_the_record_that_is_damaged_and_is_whole_again_with_the_good_one(run, name):
    good = (run / name).read_bytes()
    for what in NO_RECORDS:
        put(run / name, what)
        assert Path(name).name in refused("report", run)
    put(run / name, good)
    assert kdpipe_here("report", run, "--no-html").exit_code == 0


def with_value(good, path, value):
    record = at = json.loads(good)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(record)


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


def test_what_a_strangers_run_says_of_itself_reaches_the_terminal_without_control_characters(run):
    latency, teacher = run / "compressed" / "latency-seed0.json", run / "teacher" / "result.json"
    put(run / "recipe.json", with_value((run / "recipe.json").read_bytes(), ("name",), f"{ESCAPE}[/red]"))
    put(latency, with_value(latency.read_bytes(), ("cpu",), f"{ESCAPE}[/red]"))
    put(teacher, with_value(teacher.read_bytes(), ("examined", "per_class", 0, "name"), ESCAPE))
    (run / "teacher" / "metrics.jsonl").write_text(DEEP + f'\n{{"epoch": 1e308, "{ESCAPE}": 1}}\n')
    ended = kdpipe_here("report", run)
    assert ended.exit_code == 0, ended.stderr
    assert "\x1b[31m" not in ended.output
    assert "\u202e" not in ended.output
    page = (run / "report.html").read_text()
    assert "\x1b" not in page
    assert "<script" not in page


def test_status_tells_of_a_folder_whose_records_are_all_something_else(run):
    for what in PLACES:
        for name in ("recipe.json", "run.json", "events.jsonl", "teacher/result.json", "teacher/metrics.jsonl"):
            put(run / name, what)
        ended = kdpipe_here("status", run.parent)
        assert ended.exit_code == 0, ended.stderr


@pytest.mark.parametrize(
    ("name", "substitutes"),
    [
        ("teacher/result.json", ("pipe", "{}", b"\x80")),
        ("teacher/job.json", ("pipe", "[]", DEEP)),
        ("teacher/model.safetensors", ("pipe", "folder", "", "garbage" * 10, b"\x08\x08\x12\x07pytorch")),
        ("students/distilled-seed0/model.safetensors", ("zeros", "[]")),
        ("compressed/artefacts-seed0/card.json", ("folder", "[]")),
    ],
)
def test_a_stage_refuses_what_an_earlier_one_did_not_leave_and_goes_on_with_the_good_file(
    recipe, run, name, substitutes
):
    command = ("compress" if "card" in name else "run", recipe, "--run", run)
    good = (run / name).read_bytes()
    others = {path: path.read_bytes() for path in run.rglob("model.*") if path != run / name}
    for what in substitutes:
        put(run / name, what)
        refused(*command)
    put(run / name, good)
    ended = kdpipe_here(*command)
    assert ended.exit_code == 0, ended.stderr
    assert (run / name).read_bytes() == good
    assert {path: path.read_bytes() for path in others} == others
    assert not list(run.rglob("*.partial"))


def test_a_card_that_was_tampered_with_is_written_again(recipe, run):
    card = run / "compressed" / "artefacts-seed0" / "card.json"
    good = card.read_bytes()
    put(card, with_value(good, ("float_nodes",), None))
    ended = kdpipe_here("compress", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(card.read_bytes())["float_nodes"] == json.loads(good)["float_nodes"]


@pytest.mark.parametrize("what", ["folder", "pipe", "circle", "passwords"])
def test_a_lock_that_is_no_file_is_refused_and_left_alone(recipe, run, what):
    lock = run / ".kdpipe.lock"
    put(lock, what)
    before = lock.lstat()
    assert ".kdpipe.lock cannot be used" in refused("train-teacher", recipe, "--run", run)
    assert (lock.lstat().st_mode, lock.lstat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("what", ["folder", "pipe", "passwords", DEEP])
def test_a_journal_that_cannot_be_kept_does_not_stop_a_job(recipe, run, what):
    for name in ("events.jsonl", "run.json"):
        put(run / name, what)
    ended = kdpipe_here("train-teacher", recipe, "--run", run)
    assert ended.exit_code == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_page_takes_no_folders_place_and_goes_through_no_link(run, tmp_path):
    page = run / "report.html"
    put(page, "folder")
    ended = kdpipe_here("report", run)
    assert ended.exit_code in (1, 2)
    assert f"{page}: that is a folder" in ended.stderr
    assert page.is_dir()
    page.rmdir()
    (tmp_path / "theirs").write_text("theirs")
    page.symlink_to(tmp_path / "theirs")
    assert kdpipe_here("report", run).exit_code == 0
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert not list(run.rglob("*.partial"))


# Checkpoints


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """A run whose teacher was broken off in the midst of its training."""
    run, saved = tmp_path_factory.mktemp("stopped") / "run", []

    def save(*what):
        checkpoint.save(*what)
        saved.append(what)
        if len(saved) == 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stages.training.save", save)
        assert kdpipe_here("train-teacher", recipe, "--run", run).exit_code == 130
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
    "history": lambda _, record: record.update(history=[{"accuracy": "x"}], epoch=1),
    "parts": lambda _, record: record.update(parts="x"),
    "record": lambda *_: [1],
    "no record": lambda *_: {"a": 1},
    "weights": lambda tensors, _: tensors.update({"modules/student.fc.bias": torch.ones(3)}),
    "momentum": lambda tensors, _: tensors.update({"optimiser/0/momentum_buffer": torch.ones(3)}),
    "another parameter": lambda tensors, _: tensors.update({"optimiser/99/momentum_buffer": torch.ones(3)}),
    "no parameter": lambda tensors, _: tensors.update({f"optimiser/{ESCAPE}/x": torch.ones(3)}),
}


def test_a_damaged_checkpoint_is_refused_and_the_good_one_ends_as_if_never_stopped(recipe, stopped, done):
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
    assert kdpipe_here(*command).exit_code == 0
    model = Path("teacher", "model.safetensors")
    assert (stopped / model).read_bytes() == (done[0] / model).read_bytes()


# Data, and code of the user's own


IMAGES, LABELS = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10

ARRAYS = {
    "negative": ({"labels": LABELS - 1}, "has the label -1"),
    "10**9 classes": ({"labels": LABELS + 10**9}, "is too large"),
    "beyond int64": ({"labels": np.full(20, 2**64 - 1, np.uint64)}, "labels must fit int64"),
    "NaN": ({"images": IMAGES * np.nan}, "images must be uint8"),
    "one side": ({"images": IMAGES[:, 0, 0]}, "images must be [N, H, W]"),
    "no side": ({"images": IMAGES[:, :0]}, "images must be uint8 [N, C, H, W]"),
    "too few": ({"labels": LABELS[:3]}, "labels must be integers [20]"),
    "no sample": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "has no sample"),
    "text": ({"labels": np.array(["x"] * 20)}, "labels must be integers"),
    "classes": ({"classes": np.array([ESCAPE])}, "outside 0..0"),
}


def trained_on(recipe, tmp_path, data):
    return "train-teacher", recipe, "--run", tmp_path / "run", "--set", f'data={{name = "{data}"}}'


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_no_data_set_are_refused(recipe, tmp_path, case):
    arrays, sentence = ARRAYS[case]
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", **({"images": IMAGES, "labels": LABELS} | arrays))
    assert sentence in refused(*trained_on(recipe, tmp_path, f"npz:{tmp_path}"))


def test_a_payload_in_arrays_does_not_run_and_no_bomb_goes_off(recipe, tmp_path):
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
def test_code_of_the_users_own_that_fails_fails_in_a_sentence_and_is_never_taken_for_done(
    recipe, tmp_path, monkeypatch, key, case
):
    module = f"theirs_{key[:1]}_{list(MODULES).index(case)}"
    (tmp_path / f"{module}.py").write_text(MODULES[case])
    monkeypatch.syspath_prepend(tmp_path)
    override = f"{key}={{name = 'python:{module}:made'}}"
    said = refused("train-teacher", recipe, "--run", tmp_path / "run", "--set", override)
    assert module in said


def test_what_code_of_the_users_own_prints_does_not_get_into_the_results(recipe, tmp_path, monkeypatch):
    (tmp_path / "theirs_prints.py").write_text(
        "from torch import nn\nprint('here I am')\n"
        "def made(num_classes):\n    print('and here')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    override = "teacher.model={name = 'python:theirs_prints:made'}"
    ended = kdpipe_here("train-teacher", recipe, "--run", tmp_path / "run", "--json", "--set", override)
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["teacher"]["num_epochs"] == 6
    assert "here I am" in ended.stderr


# ONNX files


@pytest.mark.parametrize("what", [*PLACES, "", "text", b"\x80\x04]\x94.", "gone"])
def test_bench_refuses_what_is_no_onnx_file(tmp_path, what):
    if what != "gone":
        put(tmp_path / "m.onnx", what)
    assert "m.onnx" in refused("bench", tmp_path / "m.onnx", "--rounds", 3)
