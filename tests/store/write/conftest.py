"""A store in float32, whose precision can be reduced."""

import pytest
from support.made_store import make_store
from support.transcoded import FLOAT32


@pytest.fixture
def source(tmp_path):
    return make_store(tmp_path / "source.zarr", specs=FLOAT32)
