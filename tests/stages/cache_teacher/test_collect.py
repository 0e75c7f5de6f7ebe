"""Rows of a unit: their numbers, their errors, and outputs that are not finite."""

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.made_store import make_store

from kdpipe.stages.cache_teacher.collect import MEASURED_ROWS, collect_unit
from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.store import ArraySpec

LAYER = FeatureSpec("layer2")
SPECS = (ArraySpec("logits", (10,), "float16"), ArraySpec(LAYER.array, (3, 4, 4), "float16"))
BATCH = 30


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("made") / "store.zarr", num_samples=100, fill=False, specs=SPECS).manifest


@pytest.fixture
def outputs(manifest):
    generator = torch.Generator().manual_seed(0)
    num_rows = manifest.layout.units()[0].num_rows
    logits, maps = (torch.randn(num_rows, *spec.row_shape, generator=generator) for spec in SPECS)
    return ModelOutput(logits, {LAYER.layer: maps.contiguous(memory_format=torch.channels_last)})


def collect(manifest, outputs):
    ids = torch.arange(len(outputs.logits)) + 1000
    batches = ((ids[rows], moved(outputs.rows(rows))) for rows in torch.arange(len(ids)).split(BATCH))
    unit = collect_unit(batches, manifest, manifest.layout.units()[0], [LAYER])
    return unit.encode(manifest, [spec.name for spec in SPECS])


def moved(outputs):
    maps = outputs.features[LAYER.layer].to(DEVICE, memory_format=torch.channels_last)
    return ModelOutput(outputs.logits.to(DEVICE), {LAYER.layer: maps})


def test_rows_of_all_batches_are_rounded_once_and_measured(manifest, outputs):
    assert len(outputs.logits) > 2 * BATCH
    rows, fidelity = collect(manifest, outputs)
    maps = outputs.features[LAYER.layer].numpy()
    assert np.array_equal(rows["logits"], outputs.logits.half().numpy())
    assert np.array_equal(rows[LAYER.array], maps.astype(np.float16))
    measured = min(BATCH, MEASURED_ROWS)
    error = np.abs(maps.astype(np.float16).astype(np.float32) - maps)[:measured].max()
    assert fidelity[LAYER.array]["num_rows"] == measured
    assert fidelity[LAYER.array]["largest_error"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "returned NaN or infinity"), (float("-inf"), "returned NaN or infinity"), (-7e4, "reach 7e\\+04")],
)
def test_values_that_are_not_finite_name_array_and_sample(manifest, outputs, number, value, message):
    outputs.features[LAYER.layer][number, 1, 2, 3] = value
    sample = 1000 + number % len(outputs.logits)
    with pytest.raises(NotFiniteError, match=rf"{message}.*") as caught:
        collect(manifest, outputs)
    assert f"{LAYER.array} of samples [{sample}] in view 0" in str(caught.value)
    outputs.logits[number, 0] = value
    with pytest.raises(NotFiniteError, match=rf"logits of samples \[{sample}\]"):
        collect(manifest, outputs)
