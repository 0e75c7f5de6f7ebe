"""Tests of what the stages say before they start."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdpipe.pipeline.preflight import warn_of_absent_samples
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.runtime.events import RunMonitor


@pytest.mark.parametrize(
    ("present", "data", "sentences"),
    [
        ([3, 5, 8], DataConfig(), []),
        ([3, 8], DataConfig(num_train=2), []),  # a part that the recipe chose
        ([3, 8], DataConfig(), ["1 of the 3 samples of a.zarr, such as [5], are not in the data set"]),
    ],
)
def test_samples_that_the_data_set_lost_are_told(present, data, sentences):
    told = []
    run = SimpleNamespace(
        recipe=SimpleNamespace(data=data),
        context=SimpleNamespace(train_set=SimpleNamespace(sample_ids=torch.tensor(present))),
        monitor=RunMonitor(lambda event: told.append(event.job)),
    )
    store = SimpleNamespace(path="a.zarr", samples=SimpleNamespace(ids=np.array([8, 3, 5])))
    warn_of_absent_samples(run, SimpleNamespace(stores=(store,)))
    assert [sentence.partition(":")[0] for sentence in told] == sentences
