"""Cohorts of two processes are those of one, by each method.

The test runs this file as a script, which forks.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_run import STUDENT, squares, tiny_context
from support.two_processes import free_port, run_two_processes

from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.exchange import CohortPlan
from kdpipe.stages.cohort.train import ensemble_folder, train_cohort
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup, init_distributed

CONFIGS = {
    "dml": CohortConfig(members=3),
    "linear": CohortConfig(method="kdcl", combine="linear"),
    "general": CohortConfig(method="kdcl", combine="general"),
    "one": CohortConfig(method="one", members=3, branch_at="stage2"),
    "codistillation": CohortConfig(method="codistillation"),
}


def train(folder: Path, name: str, processes: ProcessGroup) -> None:
    folder.mkdir(exist_ok=True)
    context = tiny_context(folder, train_set=squares(96, 0), validation_set=squares(60, 3, "validation"))
    student = replace(STUDENT, export=False, train=replace(STUDENT.train, epochs=2, batch_size=32, precision="float32"))
    train_cohort(CohortPlan(CONFIGS[name], student, []), 0, replace(context, process_group=processes))


def run_process(rank: int, folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(place)
    with init_distributed(os.environ) as processes:
        for name in CONFIGS:
            train(folder / name, name, processes)
    (folder / f"{rank}.json").write_text(json.dumps(rank))


def main(folder: Path) -> None:
    port = free_port()
    child = os.fork()
    run_process(int(child == 0), folder, port)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    assert run_two_processes(__file__, folder) == [0, 1]
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_the_cohort_of_one(name: str, together: Path, tmp_path: Path) -> None:
    train(tmp_path / name, name, SINGLE)
    one, two = (load_file(ensemble_folder(folder / name, 0).model) for folder in (tmp_path, together))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4, msg=key)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
