"""Freed memory stays with the process, where the allocator can be told so."""

import platform
import sys

import pytest

from stages.machine.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_glibc_takes_the_settings_however_often_they_come():
    assert keep_freed_memory()
    assert keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
