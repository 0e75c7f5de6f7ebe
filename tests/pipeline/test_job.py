"""What a command adds to the messages of its stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdpipe.pipeline.job import _new_run_advised
from kdpipe.pipeline.session.options import JobOptions
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.store import FingerprintMismatch


def test_a_refused_setting_comes_with_a_command_to_paste(tmp_path: Path) -> None:
    run, job = tmp_path / "a", JobDir(tmp_path / "a" / "students" / "alone-seed0")
    (tmp_path / "a-2").mkdir()
    job.begin({"train": {"lr": 0.1}})
    options = JobOptions(set_=["student.train.lr=0.2", "data.args.token=word", "cache.store=x"])
    with (
        pytest.raises(FingerprintMismatch) as caught,
        _new_run_advised("train-student", Path("my a.toml"), options, run),
    ):
        job.begin({"train": {"lr": 0.2}})
    assert str(caught.value) == (
        f"the job in {job.path} was made from other inputs - train.lr: stored 0.1, wanted 0.2. Choose a new run, which "
        f"uses all that fits of this one (`kdpipe run 'my a.toml' --set student.train.lr=0.2 --set "
        f"data.args.token=... --run {tmp_path / 'a-3'}`), or delete that folder to restart the job."
    )
