"""Tests of memory figures and of keeping freed memory."""

import platform
import sys

import pytest
import torch

from kdpipe.stages.runtime.memory import (
    available_bytes,
    disable_malloc_trim,
    free_gpu_bytes,
    installed_bytes,
    limit_bytes,
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_glibc_accepts_the_settings_repeatedly():
    assert disable_malloc_trim()
    assert disable_malloc_trim()


def test_other_systems_are_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not disable_malloc_trim()


def test_lowest_limit_of_control_groups_is_returned(tmp_path):
    assert 0 < available_bytes() < installed_bytes()
    assert limit_bytes(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for folder, limit in (("", "max"), ("a", "1000000"), ("a/b", str(2**60))):
        path = tmp_path / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(limit + "\n")
    assert limit_bytes(tmp_path) == 1_000_000


@pytest.mark.parametrize(("fraction", "free"), [(1.0, 700), (0.5, 300), (0.1, 0)])
def test_free_gpu_memory_is_that_of_the_share(monkeypatch, fraction, free):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    assert free_gpu_bytes(torch.device("cuda:0")) == free
