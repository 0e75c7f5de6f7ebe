"""The plug-in of examples/plugin, installed: found by its entry point, from the command line and from Python."""

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from support.device import DEVICE
from support.kdpipe_process import environment
from support.paths import ROOT
from support.warm_process import WarmProcess

PLUGIN = ROOT / "examples" / "plugin"
RECIPE = """
# Command: kdpipe run plugged.toml. Hardware: any. Time: seconds. Expect: a done run.
name = "plugged"
device = "DEVICE"
num_threads = 1
callbacks = ["BestEpochs"]
data = { name = "bars" }
views = { num_views = 2, operations = ["RandomHorizontalFlip"] }
teacher = { model = { name = "two_layers", args = { width = 32 } }, train = { epochs = 3, batch_size = 32 } }
student = { model = { name = "two_layers", args = { width = 8 } }, train = { epochs = 3 }, seeds = [0] }
distill = [{ loss = "logit_mae", margin = 0.1 }]
compress = { steps = ["quantize"], baselines = false, latency_rounds = 3, quantize_train = { epochs = 1 } }
""".replace("DEVICE", str(DEVICE))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder and an environment in which the plug-in is installed, as pip lays it out."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(PLUGIN / "kdpipe_example_plugin.py", site)
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = site / f"kdpipe_example_plugin-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in own.items()) for group, own in groups]
    (info / "entry_points.txt").write_text("".join(lines))
    folder = tmp_path_factory.mktemp("work")
    (folder / "plugged.toml").write_text(RECIPE)
    return folder, {**environment(), "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def run(installed, *command):
    """Run `kdpipe`, or a script, where the plug-in is installed."""
    folder, environ = installed
    before = Path.cwd()
    os.chdir(folder)
    try:
        process = WarmProcess([*map(str, command)], environ)
    finally:
        os.chdir(before)
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.wait(), out, errors)


def test_commands_list_what_the_plugin_brings(installed):
    losses = run(installed, "kdpipe", "losses", "--json")
    assert "logit_mae" in {loss["name"] for loss in json.loads(losses.stdout)["losses"]}, losses.stderr
    schema = run(installed, "kdpipe", "recipe", "schema")
    assert "logit_mae" in schema.stdout
    assert run(installed, "kdpipe", "recipe", "check", "plugged.toml").stdout.startswith("plugged.toml: fine")


def test_recipe_check_knows_the_keys_of_the_plugin(installed):
    folder, _ = installed
    (folder / "wrong.toml").write_text(RECIPE.replace("margin", "margn").replace("width = 8", "wdth = 8"))
    checked = run(installed, "kdpipe", "recipe", "check", "wrong.toml")
    assert checked.returncode == 2
    assert "did you mean 'margin'" in checked.stdout
    (folder / "wrong.toml").write_text(RECIPE.replace("width = 8", "wdth = 8"))
    assert "no argument 'wdth'" in run(installed, "kdpipe", "recipe", "check", "wrong.toml").stdout


@pytest.mark.slow
def test_recipe_runs_with_the_plugin(installed):
    folder, _ = installed
    ended = run(installed, "kdpipe", "run", "plugged.toml")
    assert ended.returncode == 0, ended.stderr
    job = folder / "runs" / "plugged" / "students" / "distilled-seed0"
    assert json.loads((job / "best_epochs.json").read_text())[0] == 0
    assert "source_sha256" in (job / "job.json").read_text()
    artifacts = folder / "runs" / "plugged" / "compressed" / "artifacts-seed0" / "int8"
    code = (
        "import kdpipe as kd, torch\n"
        "train, _ = kd.load_dataset('bars')\n"
        f"student = kd.load_student({str(artifacts)!r})\n"
        "print(student(train.images[:4]).shape, kd.create_model('two_layers', train, width=4)[1].out_features)\n"
    )
    (folder / "load.py").write_text(code)
    ended = run(installed, folder / "load.py")
    assert ended.stdout == "torch.Size([4, 2]) 4\n", ended.stderr


def test_broken_plugin_is_a_warning(installed, tmp_path):
    folder, environ = installed
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kdpipe.plugins]\nbroken = no_such_module\n")
    environ = {**environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), environ["PYTHONPATH"]])}
    ended = run((folder, environ), "kdpipe", "losses", "--json")
    assert ended.returncode == 0
    assert "logit_mae" in ended.stdout
    assert "broken" in ended.stderr
    assert "update or uninstall" in ended.stderr
