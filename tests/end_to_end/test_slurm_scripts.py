"""The job scripts of docs/slurm, run with fake Slurm commands: when a job is requeued, and when not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPTS = ROOT / "docs" / "slurm"
REQUEUED = ("one-gpu.sh", "cache-array.sh", "several-gpus.sh")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda script: script.name)
def test_scripts_pass_bash_and_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def slurm(folder, code, wait_s=0.0):
    """Write fake commands, first on the PATH: `srun` exits with `code`; all log their arguments."""
    bodies = {
        "srun": f"sleep {wait_s}; exit {code}",
        "scontrol": '[ "$1" != show ] || echo node1',
        "sbatch": "echo $(( $(wc -l < calls) ))",
    }
    for name, body in bodies.items():
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> calls\n{body}\n')
        (folder / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "4"}
    return {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("script", REQUEUED)
@pytest.mark.parametrize("code", [0, 1, 2, 11, 12, 75])
def test_only_a_job_stopped_early_is_requeued(script, code, tmp_path):
    environment = slurm(tmp_path, code)
    ended = subprocess.run(["bash", SCRIPTS / script, "r.toml", "a b"], cwd=tmp_path, env=environment, check=False)
    calls = (tmp_path / "calls").read_text()
    assert ended.returncode == code
    assert "kdpipe" in calls and "r.toml" in calls and "a b" in calls
    assert ("scontrol requeue 7" in calls) == (code == 75)


@pytest.mark.parametrize("script", REQUEUED)
def test_a_cancelled_job_is_not_requeued(script, tmp_path):
    job = subprocess.Popen(["bash", SCRIPTS / script, "r.toml"], cwd=tmp_path, env=slurm(tmp_path, 75, wait_s=0.5))
    while "srun" not in ((tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""):
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_pipeline_jobs_depend_on_the_one_before(tmp_path):
    command = ["bash", SCRIPTS / "pipeline.sh", "r.toml", "runs/r", "--partition=gpu"]
    ended = subprocess.run(command, cwd=tmp_path, env=slurm(tmp_path, 0), check=True, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [word for call in calls for word in call.split() if "dependency" in word] == [
        f"--dependency=afterok:{number}" for number in (1, 2, 3)
    ]
    stages = ("one-gpu.sh train-teacher r.toml", "cache-array.sh r.toml runs/r", "train-student", "compress")
    assert all(stage in call and "--partition=gpu" in call for stage, call in zip(stages, calls, strict=True))
    assert "compression 4" in ended.stdout
