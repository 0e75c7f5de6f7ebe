"""Bad values for every argument and option of every command: absent, of a wrong type, absurd, hostile.

The list of options comes from the command line itself, so that a new one without bad values fails a test.
"""

import json
import os
import signal
import subprocess
from itertools import cycle

import pytest
import typer
from support.kdpipe_process import COMMAND, RECIPE, environment, kdpipe_here
from support.made_store import make_store
from support.refusals import ESCAPE, LONG, require_refused, tree

from kdpipe.pipeline.main import app
from kdpipe.pipeline.recipe.load import load_recipe, recipe_json

NUMBERS = ["", "x", "1.5", "-1", "nan", "inf", "1e309", "0x10", ESCAPE, "9" * 5000, "--json"]
TOO_MANY = [*NUMBERS, "0", "1" + "0" * 30]
NAMES = ["", ESCAPE, "\udcff", "a\u2028b"]
"""Names of outputs: empty, control characters, not UTF-8, a line separator."""

ABSENT = ["absent", "absent/deeper", "file/x", "~nobody/x", "dangling", "loop", "x" * 300, ESCAPE, "\udcff", "𝒳\u202e"]
ODD = ["folder", "fifo", "/dev/null", "/dev/zero", "", "../.."]
NO_RECIPE = [*ABSENT, *ODD, "file", "-x", LONG]
NO_STORE = [*ABSENT, "folder", "fifo", "file", "/dev/null", "-x", LONG]
NO_RUN_CAN_BE = [*NAMES, "file", "file/x", "loop", "fifo", "/dev/null", "x" * 300, LONG]
# Devices to write to are links in the test folder: should one be replaced, only the link is lost.
NO_FILE_CAN_BE = [*NAMES, "folder", "absent/x.png", "file/x.png", "loop", "fifo", "full.png", "..", "x" * 300, LONG]
OVERRIDES = ["", "x", "=", "=1", ".=1", "a..b=1", "name=", "name=../x", f"name={ESCAPE}", f"{ESCAPE}=1", "\udcff=1"]
OVERRIDES += ["student.seeds=" + "[" * 5000, "seed=1e400", "seed=" + "9" * 5000, "seed=nan", "distill.9.loss=kd", LONG]
LINES = ["", ESCAPE]

BAD = {
    "recipe": NO_RECIPE,
    "recipes": NO_RECIPE,
    "--set": OVERRIDES,
    "--run": NAMES,
    **{
        f"{command} --run": NO_RUN_CAN_BE
        for command in (
            "run",
            "demo",
            "train-teacher",
            "cache-teacher",
            "train-student",
            "compress",
            "compare",
            "sweep",
            "search",
        )
    },
    "generations --run": NO_RUN_CAN_BE,
    "--workspace": [*NAMES, *ABSENT, "file", "fifo", "/dev/null", LONG],
    "--max-duration": ["", "0", "-1", "1", "nan", "inf", "1e309", "3h30", "3m2h", "00:00:00", "１h", ESCAPE, LONG],
    "--part": ["", "x", "1", "1/1", "-1/2", "0/0", "1/2/3", "0/" + "9" * 30, "１/２", "0/1\n", ESCAPE, LONG],
    "--only": ["", "x", "PRUNE", ESCAPE, LONG],
    "--from": [*NAMES, *ABSENT, "folder", "fifo", "/dev/null", "/dev/zero", "..", LONG],
    "--count": [*TOO_MANY, "101"],
    "--samples": [*TOO_MANY, "101"],
    "--views": [*TOO_MANY, "101"],
    "--save": [*NO_FILE_CAN_BE, "views.jpg"],
    "--batches": TOO_MANY,
    "runs": [*ABSENT, "folder", "file", "fifo", "/dev/null", "", "-x", LONG],
    "--html": NO_FILE_CAN_BE,
    "folder": [*ABSENT, "file", "fifo", "/dev/null", "-x", LONG],
    "losses name": ["", "x", "KD", "../kd", ESCAPE, LONG],
    "models": [*ABSENT, "folder", "file", "fifo", "/dev/null", "/dev/zero", "", "-x", LONG],
    "--batch-size": TOO_MANY,
    "--threads": TOO_MANY,
    "--rounds": [*TOO_MANY, "2"],
    "path": NO_STORE,
    "place": NO_STORE,
    "--max-kl": ["", "x", "0", "-1", "nan", "inf", "1e309", ESCAPE, LONG],
    "--recompute": [*NUMBERS, "0"],
    "--recipe": NO_RECIPE,
    "--seed": NUMBERS,
    "--keep": TOO_MANY,
    "source": NO_STORE,
    "target": [*NAMES, "folder", "file", "file/x", "loop", "fifo", "a.zarr", "a.zarr/x", ".", "x" * 300, LONG],
    "--top-k": [*TOO_MANY, "11"],
    "--sampled-labels": [*TOO_MANY, "11"],
    "--encoding": ["", "int2", "float16"],
    "--temperatures": ["", "1", "x 1", "0 1", "1 0", "-1 2", "nan nan", "1 inf", "1e309 1", "2 1", "1 1e30", "0 0"],
    "--feature-dtype": ["", "x", "float32", ESCAPE, LONG],
    "--dtype": ["", "x", "int8", "object", ESCAPE, LONG],
    "--array": ["", "x", "../x", ESCAPE, LONG],
    "--archive": ["", "x", "ZSTD", ESCAPE, LONG],
    "--level": TOO_MANY,
    "--keep-bits": [*TOO_MANY, "99"],
    "file": [ESCAPE, "folder", "fifo", "loop", "file", "absent/x.toml", "..", "x" * 300, "-x"],
    "--name": [*LINES, "-1", "../..", "a/b", 'a"b', LONG],
    "--data": [*LINES, "x", "0", "npz:", LONG],
    "--root": LINES,
    "--image-size": TOO_MANY,
    "--teacher": [*LINES, "x", "0", "python:", LONG],
    "--teacher-weights": [*LINES, *ABSENT, "folder"],
    "--classes": [*LINES, *ABSENT, "folder", "file"],
    "--normalization": [*LINES, "x", "1/0", "nan/1", "0.5/1e309", "1/2/3", "1,2/1,2", LONG],
    "--student": [*LINES, "x", "0", "python:", LONG],
    "--loss": [*LINES, "x", "KD", LONG],
    "--layers": [*LINES, "x", "a,b,c", LONG],
    "--seeds": [*TOO_MANY, "101"],
    "--compress": [*LINES, "x", "2", "nan", LONG],
    "--prune-ratio": ["", "x", "-1", "1", "nan", "inf", "1e309", ESCAPE, LONG],
}

ARGUMENTS = {
    "recipe": "tiny.toml",
    "recipes": "tiny.toml",
    "runs": "run",
    "models": "file",
    "path": "a.zarr",
    "place": "tiny.toml",
    "source": "a.zarr",
    "target": "made.zarr",
    "file": "made.toml",
}
NEEDED = {
    "store rm-views": ["--keep", "1"],
    "recipe new": ["--yes"],
}
"""Other options that make only the bad value wrong."""
ALSO = {
    "--recompute": ["--recipe", "tiny.toml"],
    "--recipe": ["--recompute", "1"],
    "store verify --set": ["--recompute", "1", "--recipe", "tiny.toml"],
    "store verify --run": ["--recompute", "1", "--recipe", "tiny.toml"],
    "--seed": ["--recompute", "1", "--recipe", "tiny.toml"],
    "--root": ["--data", "CIFAR10"],
    "--image-size": ["--data", "imagefolder:folder", "--root", "."],
    "--classes": ["--data", "CIFAR10", "--teacher", "resnet18", "--teacher-weights", "published"],
    "--normalization": ["--teacher-weights", "file"],
    "--layers": ["--loss", "hint"],
    "--temperatures": ["--top-k", "3"],
    "--level": ["--archive", "zstd"],
}


def commands(group, path=()):
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


ALL = typer.main.get_command(app)
COMMANDS = dict(commands(ALL))


def called(parameter):
    """Return an option's first spelling, or an argument's name."""
    return parameter.opts[0]


def bad_values(command, name):
    return BAD.get(f"{command} {name}", BAD.get(name))


EVERY = [(command, called(parameter)) for command, entry in COMMANDS.items() for parameter in entry.params]
CASES = [(command, name) for command, name in EVERY if bad_values(command, name)]


def arguments(command, name, value):
    """Return a command line in which only `value` is wrong."""
    words, options = command.split(), []
    for parameter in COMMANDS[command].params:
        argument = called(parameter)
        if argument == name:
            options += [value] if parameter.param_type_name == "argument" else []
        elif argument in ARGUMENTS and parameter.param_type_name == "argument":
            options.append(ARGUMENTS[argument])
    if name.startswith("--"):
        options += [name, *(value.split(" ") if name == "--temperatures" else [value])]
    needed = [] if name in NEEDED.get(command, ()) else NEEDED.get(command, [])
    return [*words, *options, *needed, *ALSO.get(f"{command} {name}", ALSO.get(name, []))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, a store, an unfinished run, and obstacles such as pipes and links."""
    folder = tmp_path_factory.mktemp("place") / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "tiny.toml").write_text(RECIPE)
    make_store(folder / "a.zarr", num_samples=20)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text(json.dumps(recipe_json(load_recipe(folder / "tiny.toml"))))
    (folder / "folder").mkdir()
    (folder / "folder" / "content").write_text("content")
    (folder / "file").write_text("content")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "full.png").symlink_to("/dev/full")
    os.mkfifo(folder / "fifo")
    return folder


@pytest.fixture(autouse=True)
def abort_waiting(place, monkeypatch):
    """Abort a command that waits for a pipe."""

    def abort(number, frame):
        raise TimeoutError("the command waits forever")

    before = signal.signal(signal.SIGALRM, abort)
    signal.setitimer(signal.ITIMER_REAL, 120, 5)
    monkeypatch.chdir(place)
    monkeypatch.setattr("typer.testing._get_command", lambda app: ALL, raising=False)  # else built for every value
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_every_parameter_has_bad_values_here():
    without = [
        f"{command} {called(parameter)}"
        for command, entry in COMMANDS.items()
        for parameter in entry.params
        if not getattr(parameter, "is_flag", False) or called(parameter) == "--keep"
        if not bad_values(command, called(parameter))
    ]
    assert without == []
    names = {called(parameter) for command in COMMANDS.values() for parameter in command.params}
    assert {key.split(" ")[-1] for key in BAD} <= names, "remove the bad values of a removed option"


@pytest.mark.parametrize(("command", "name"), CASES)
def test_bad_values_are_one_sentence_and_change_nothing(place, command, name):
    before = tree(place)
    for value in bad_values(command, name):
        given = arguments(command, name, value)
        require_refused(kdpipe_here(*given), given, on_stdout=command == "recipe check")
    assert tree(place) == before


FIRST = {command: name for command, name in reversed(CASES) if command != "recipe check"}  # its faults are its document


@pytest.mark.parametrize(("command", "name"), [case for case in FIRST.items() if (case[0], "--json") in EVERY])
def test_refused_values_leave_json_stdout_empty(place, command, name):
    given = [*arguments(command, name, bad_values(command, name)[0]), "--json"]
    require_refused(kdpipe_here(*given), given)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_options_and_unknown_parameters(place, command):
    before, words = tree(place), command.split()
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "option":
            flag = getattr(parameter, "is_flag", False) and called(parameter) != "--keep"
            given = [*words, f"{called(parameter)}=1"] if flag else [*words, "tiny.toml", called(parameter)]
            require_refused(kdpipe_here(*given), given)
    for unknown in ([f"--{ESCAPE}"], ["--nonsense"], [f"--{LONG}"], ["tiny.toml", "b", "c", "d", ESCAPE, "--", "-e"]):
        if unknown[0].startswith("--") or command not in ("recipe check", "report", "bench"):  # those take many
            require_refused(kdpipe_here(*words, *unknown), (command, unknown))
    assert tree(place) == before


@pytest.mark.parametrize("words", [[ESCAPE], [LONG], ["\n"], ["--nonsense"], ["store", ESCAPE], ["recipe", "x"]])
def test_unknown_commands_are_refused(place, words):
    require_refused(kdpipe_here(*words), words)


@pytest.mark.parametrize(
    "words",
    [
        ["report", "run", "--html", "page.html", "--no-html"],
        ["store", "verify", "a.zarr", "--recompute", "1"],
        ["store", "verify", "a.zarr", "--recipe", "tiny.toml"],
        ["store", "verify", "a.zarr", "--seed", "3"],
        ["store", "verify", "a.zarr", "--set", "seed=1"],
        ["store", "transcode", "a.zarr", "made.zarr", "--logits-only", "--array", "features/layer2.0"],
        ["store", "transcode", "a.zarr", "made.zarr", "--temperatures", "1", "20"],
        ["store", "transcode", "a.zarr", "made.zarr", "--archive", "none", "--level", "3"],
        ["store", "transcode", "a.zarr", "made.zarr", "--level", "3"],
        ["store", "advise", "a.zarr", "--set", "seed=1"],
        ["cache-teacher", "tiny.toml", "--dry-run", "--part", "9/3"],
        ["views", "tiny.toml", "--samples", "1", "--samples", "0"],
    ],
)
def test_contradicting_options_are_refused(place, words):
    before = tree(place)
    require_refused(kdpipe_here(*words), words)
    assert tree(place) == before


@pytest.mark.parametrize("name", ["null", "zero", "full"])
def test_a_page_never_replaces_a_device(place, tmp_path, name):
    """As root, a rename onto /dev/null would break the machine: here it is a link to it."""
    (tmp_path / "page.html").symlink_to(f"/dev/{name}")
    ended = kdpipe_here("report", "run", "--html", tmp_path / "page.html")
    require_refused(ended, name)
    assert "not a regular file and will not be replaced" in ended.stderr
    assert (tmp_path / "page.html").is_symlink()


def test_a_wrong_recipe_is_reported_before_reading_the_store(place, monkeypatch):
    verify = "kdpipe.store.check.verify.verify_store"
    monkeypatch.setattr(verify, lambda *arguments: pytest.fail("the store was read first"))
    require_refused(kdpipe_here("store", "verify", "a.zarr", "--recipe", "absent", "--recompute", "1"), "verify")


VARIABLES = [
    *({"KDPIPE_SEED": value} for value in ("x", "nan", "1e400", "9" * 5000, ESCAPE, "-1", "[1", "\udcff")),
    {"KDPIPE_": "1"},
    {"KDPIPE__": "1"},
    {"KDPIPE_SEED__X": "1"},
    {"KDPIPE_NONSENSE": "1"},
    {"KDPIPE_DISTILL__9__LOSS": "kd"},
]


@pytest.mark.parametrize(("command", "given"), list(zip(cycle(["run", "plan", "views", "store repair"]), VARIABLES)))
def test_invalid_recipe_variables_are_refused(place, monkeypatch, command, given):
    before = tree(place)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    require_refused(kdpipe_here(*command.split(), "tiny.toml"), given)
    assert tree(place) == before


LAUNCHES = [
    {"RANK": "x", "WORLD_SIZE": "2"},
    {"RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "2", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "0"},
    {"RANK": ESCAPE, "WORLD_SIZE": ESCAPE},
    {"RANK": "", "WORLD_SIZE": ""},
    {"RANK": "0", "WORLD_SIZE": "9" * 30},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ESCAPE, "MASTER_PORT": "x"},
    {"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"},
    {"SLURM_STEP_NUM_TASKS": "x"},
]


@pytest.mark.parametrize(
    ("command", "given"), list(zip(cycle(["train-teacher", "train-student", "compress", "run"]), LAUNCHES))
)
def test_invalid_launcher_variables_are_refused(place, monkeypatch, command, given):
    before = tree(place)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    require_refused(kdpipe_here(command, "tiny.toml"), given)
    assert tree(place) == before


@pytest.mark.parametrize("width", ["0", "-1", "x", "999999999", "9" * 30])
def test_absurd_terminal_widths_are_harmless(place, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("LINES", width)
    for words, code in ((["status"], 1), (["status", "."], 0), (["report", "run", "--no-html"], 3), (["losses"], 0)):
        ended = kdpipe_here(*words)
        assert ended.exit_code == code, (words, ended.stderr, ended.exception)
        assert len(ended.stdout) < 10**6


def in_a_shell(words, redirected):
    """Run `kdpipe` in a shell with redirected output; return the exit status and what remains on stdout and stderr."""
    line = f'"$@" {redirected}'
    command = ["sh", "-c", line, "sh", *COMMAND, *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("words", [["status", "."], ["--help"]])
def test_a_full_or_closed_stdout(place, words):
    full = in_a_shell(words, ">/dev/full")
    assert (full.returncode, full.stdout) == (1, "")
    assert full.stderr == "kdpipe: error: No space left on device: standard output.\n"
    closed = in_a_shell(words, ">&-")
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_errors_do_not_go_to_stdout_if_stderr_is_closed(place):
    ended = in_a_shell(["status", "absent", "--json"], "2>&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")
