from __future__ import annotations

import dataclasses

import pytest
from support.made_store import make_store
from support.tiny_run import VIEWS, make_tiny_store, squares, tiny_context

from kdpipe.stages.targets.open import open_with_views
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.from_store import views_of_store
from kdpipe.stages.views.mix import MixConfig
from kdpipe.store import FingerprintMismatch, StoreError, TargetStore, open_store

CROP = {"name": "RandomCrop", "size": [8, 8], "padding": 1}
OWN = "from torchvision.transforms import v2\ndef make():\n    return v2.RandomAffine(20, translate=(0.1, 0.1))\n"


def store_of(path, views, num_views=2):
    """A store that records these views, of nothing else."""
    store = open_store(make_store(path, num_views=num_views, num_samples=50).path)
    identity = dataclasses.replace(store.manifest.identity, views=views)
    return TargetStore(path, dataclasses.replace(store.manifest, identity=identity), store.samples, {})


@pytest.mark.parametrize(
    "views",
    [
        VIEWS,
        Views(1),
        Views(2, ["RandomCrop", {"name": "RandomErasing", "value": "random"}], seed=2**60),
        Views(2, [CROP], mix=MixConfig(mixup_alpha=0.4, p=0.3)),
        Views(2, [CROP, "RandomHorizontalFlip"], engine="transforms", mix=MixConfig(cutmix_alpha=1.0)),
        Views(3, engine="transforms", transform="python:own_views_of_store:make"),
    ],
)
def test_views_of_a_store_are_those_that_made_it(tmp_path, monkeypatch, views):
    (tmp_path / "own_views_of_store.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    context = tiny_context(tmp_path, views=views)
    rebuilt = views_of_store(store_of(tmp_path / "made.zarr", context.view_identity(), views.num_views))
    assert dataclasses.replace(rebuilt, operations=()) == dataclasses.replace(views, operations=())
    assert dataclasses.replace(context, views=rebuilt).view_identity() == context.view_identity()


def test_views_of_a_store_open_it(tmp_path):
    context = tiny_context(tmp_path, train_set=squares(60, 0))
    path = make_tiny_store(context)
    views = views_of_store(open_store(path))
    assert views.num_views == VIEWS.num_views
    assert open_with_views(path, dataclasses.replace(context, views=views).view_identity(), {}).num_views == 3
    other = dataclasses.replace(context, views=dataclasses.replace(views, seed=1))
    with pytest.raises(FingerprintMismatch, match=r"views.seed: stored 0, wanted 1"):
        open_with_views(path, other.view_identity(), {})


def test_a_record_that_is_not_of_views_is_refused(tmp_path):
    for number, record in enumerate(({"engine": "other"}, {"operations": [3]}, {"mix": {"p": "x"}})):
        with pytest.raises(StoreError, match=r"records views that this version of kdpipe cannot rebuild"):
            views_of_store(store_of(tmp_path / f"{number}.zarr", record))
