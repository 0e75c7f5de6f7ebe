"""`kd.train_cohort`: members and ensemble as results that the other functions take."""

import pytest
import torch
from support.device import DEVICE

import kdpipe as kd
from kdpipe.stages.errors import RecipeError

QUIET = {"progress": False, "device": DEVICE, "options": {"export": False}, "epochs": 1, "batch_size": 32}


@pytest.fixture(scope="module")
def digits():
    return kd.load_dataset("digits", num_train=64)


@pytest.mark.filterwarnings("ignore")
def test_members_and_ensemble_go_on(digits, tmp_path):
    train, test = digits
    views = kd.Views(2, [{"name": "RandomCrop", "padding": 1}])
    other = kd.create_model("cnn", train, width=3)
    call = {"test": test, "views": views, "model_args": {"width": 4}, "run": tmp_path / "run", **QUIET}
    result = kd.train_cohort(["cnn", other], train, **call)
    assert result.members[0].num_parameters > result.members[1].num_parameters
    assert result.ensemble.num_parameters == sum(member.num_parameters for member in result.members)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        mean = torch.stack([member.model(images) for member in result.members]).mean(0)
        torch.testing.assert_close(result.ensemble.model(images), mean)
    assert result.best in result.members
    again = kd.train_cohort(["cnn", other], train, **call)
    assert again.ensemble.figures == result.ensemble.figures
    store = kd.cache_teacher(
        result.ensemble.model, train, tmp_path / "store.zarr", views=views, device=DEVICE, progress=False
    )
    taught = kd.train_cohort("cnn", train, store, test=test, method="kdcl", run=tmp_path / "taught", **QUIET)
    assert "adapters_sha256" not in taught.members[0].figures
    assert "kd_0_stored" in taught.members[0].history[-1]["losses"]


def test_equal_members_are_refused(digits, tmp_path):
    train, test = digits
    network = kd.create_model("cnn", train, width=3)
    with pytest.raises(RecipeError, match="start from the same weights"):
        kd.train_cohort(network, train, test=test, run=tmp_path / "run", **QUIET)


def test_losses_without_a_store_are_refused(digits):
    train, test = digits
    with pytest.raises(RecipeError, match="losses need a store"):
        kd.train_cohort("cnn", train, test=test, losses="kd", **QUIET)
