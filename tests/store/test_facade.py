"""The public names of `store`, which are imported when they are first used."""

import subprocess
import sys
from pathlib import Path

import pytest

import store


def test_every_public_name_is_there_and_listed():
    for name in store.__all__:
        assert getattr(store, name).__module__.startswith("store."), name
    assert set(store.__all__) <= set(dir(store))


def test_a_name_that_is_none_is_an_error_as_in_any_module():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = store.nothing
    with pytest.raises(ImportError, match="nothing"):
        from store import nothing  # noqa: F401


def test_a_room_named_like_a_function_does_not_take_its_place_whoever_comes_first():
    look = "import store.transcode as room; import store; from store import transcode; assert callable(transcode)"
    look += "; assert callable(store.transcode)"
    root = Path(store.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", look], cwd=root, check=False).returncode == 0


def test_locks_and_errors_come_without_numpy():
    look = "import sys; from store import exclusive, KdpipeError, LockedError; sys.exit('numpy' in sys.modules)"
    root = Path(store.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", look], cwd=root, check=False).returncode == 0
