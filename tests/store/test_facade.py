"""The facade `store`: lazy public names."""

import subprocess
import sys

import pytest
from support.paths import ROOT

from kdpipe import store


def test_public_names_resolve_and_are_listed():
    assert sorted(store._MODULE_OF) == sorted(store.__all__)
    for name in store.__all__:
        assert getattr(store, name).__module__.startswith("kdpipe.store."), name
    assert set(store.__all__) <= set(dir(store))


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = store.nothing
    with pytest.raises(ImportError, match="nothing"):
        from kdpipe.store import nothing  # noqa: F401


@pytest.mark.parametrize(
    "imports",
    [
        "from kdpipe.store import exclusive, read_json, KdpipeError, LockedError",
        "from kdpipe.store.format.schema import ATTRIBUTE, MARKERS, SCHEMA_VERSION",
    ],
)
def test_locks_errors_and_schema_import_without_numpy(imports):
    script = f"import sys; {imports}; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
