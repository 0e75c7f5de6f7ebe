"""Tests of the settings for equal bytes on a GPU."""

import torch
from torch.utils import deterministic as filling

from kdpipe.stages.compute.determinism import set_deterministic


def settings():
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        *(cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory),
    )


def test_settings_of_a_gpu_are_restored(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    restore = set_deterministic(torch.device("cuda"))
    assert settings() == (True, True, True, False, False)
    restore()
    assert settings() == before


def test_errors_that_the_user_wants_stay_errors():
    torch.use_deterministic_algorithms(True)
    try:
        restore = set_deterministic(torch.device("cuda"))
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        restore()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cpu_settings_stay():
    before = settings()
    set_deterministic(torch.device("cpu"))
    assert settings() == before
