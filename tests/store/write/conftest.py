"""A store in float32, whose precision can be reduced."""

import pytest
from made_store import make_store
from transcoded import FLOAT32


@pytest.fixture
def source(tmp_path):
    return make_store(tmp_path / "source.zarr", specs=FLOAT32)
