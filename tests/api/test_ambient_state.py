"""Calls of the Python API do not depend on torch's ambient state, and leave it as it was; interrupted ones continue."""

import signal
import threading

import pytest
import torch
from support.device import DEVICE
from support.made_store import folder_bytes
from torch import nn

import kdpipe as kd
from kdpipe.stages.runtime.cpu import has_bfloat16

pytestmark = pytest.mark.usefixtures("without_onnx")

QUIET = {"device": DEVICE, "progress": False}
TRAIN = {"epochs": 2, "batch_size": 20, **QUIET}


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data():
    return kd.load_dataset("digits", num_train=60)


def test_generator_of_the_caller_goes_on(data):
    train, test = data
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = []
    for number in range(3):
        kd.train_student("mlp", train, test=test, model_args={"hidden": [4]}, seed=number, **TRAIN)
        found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize(
    "state",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_surrounding_modes_change_no_number(data, state):
    train, test = data
    stores, accuracies = [], []
    for where in ("plain", "within"):
        torch.manual_seed(0)
        teacher = network()
        with state() if where == "within" else torch.enable_grad():
            accuracies.append(kd.train_teacher(teacher, train, test=test, run=where, **TRAIN).figures["cross_entropy"])
            stores.append(kd.cache_teacher(teacher, train, f"{where}.zarr", **QUIET))
    assert accuracies[0] == accuracies[1]
    assert folder_bytes(stores[0].path) == folder_bytes(stores[1].path)


@pytest.mark.skipif(not has_bfloat16(), reason="bfloat16 is slow on this CPU, and refused")
def test_a_student_in_low_precision_learns_as_one_in_float32(data):
    train, test = data
    losses = {}
    for precision in ("float32", "bfloat16"):
        own = {**TRAIN, "precision": precision, "epochs": 4, "lr": 0.05}
        student = kd.train_student("mlp", train, test=test, model_args={"hidden": [32]}, run=precision, **own)
        losses[precision] = [epoch["losses"]["hard_labels"] for epoch in student.history]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"][-1] < 0.9 * losses["bfloat16"][0]


@pytest.mark.parametrize(
    ("change", "restore", "message"),
    [
        (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
            "torch.float64",
        ),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None), "device is meta"),
    ],
    ids=["dtype", "device"],
)
def test_other_defaults_of_torch_are_refused(data, change, restore, message):
    change()
    try:
        with pytest.raises(kd.KdpipeError, match=message):
            kd.create_model("cnn", data[0])
    finally:
        restore()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_network_is_trained_in_place(data, wrap):
    train, test = data
    plain, inner = network(), network()
    inner.load_state_dict(plain.state_dict())
    kd.train_teacher(plain, train, test=test, run="plain", **TRAIN)
    kd.train_teacher(wrap(inner), train, test=test, run="wrapped", **TRAIN)
    assert torch.equal(inner[1].weight.cpu(), plain[1].weight)  # DataParallel moves it to a GPU


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network().requires_grad_(False), "no parameter that requires a gradient"),
        (lambda: network().to("meta"), "has no values yet"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "has no values yet"),
        (lambda: network().half(), "call .float"),
        (lambda: torch.jit.script(network()), "TorchScript"),
        (lambda: with_lock(network()), "cannot be copied"),
    ],
)
def test_network_that_cannot_be_trained_is_refused(data, make, message):
    train, test = data
    with pytest.raises(kd.KdpipeError, match=message):
        kd.train_teacher(make(), train, test=test, **TRAIN)


def with_lock(model):
    model.lock = threading.Lock()
    return model


def test_interrupted_call_saves_and_continues(data):
    (train, test), handler = data, signal.getsignal(signal.SIGINT)

    class Interrupt(kd.Callback):
        def on_epoch_end(self, state):
            if state.epoch == 2:
                signal.raise_signal(signal.SIGINT)

    settings = {**TRAIN, "epochs": 4, "model_args": {"hidden": [4]}}
    with pytest.raises(KeyboardInterrupt, match="the same call continues"):
        kd.train_student("mlp", train, test=test, run="stopped", callbacks=[Interrupt()], **settings)
    assert list((kd.runs.Path("stopped") / "students").rglob("checkpoint.safetensors"))
    files = []
    for run in ("stopped", "whole"):
        result = kd.train_student("mlp", train, test=test, run=run, **settings)
        files.append((result.folder / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_students_of_a_run_differ_in_their_seeds_only(data):
    train, test = data
    torch.manual_seed(0)
    store = kd.cache_teacher(
        network(), train, "store.zarr", mean=[0.5], std=[0.5], test=test, expected_accuracy=0, **QUIET
    )
    settings = {"test": test, "run": "run", "model_args": {"hidden": [4]}, **TRAIN}
    kd.train_student("mlp", train, **settings)
    for seed in range(2):
        kd.train_student("mlp", train, store, seed=seed, **settings)
    kd.train_student("mlp", train, seed=1, **settings)
    rows = {row.kind: row.num_seeds for row in kd.report("run").rows}
    assert rows["student"] == rows["alone"] == 2
    for other in ({"lr": 0.5}, {"model_args": {"hidden": [5]}}, {"losses": [kd.losses.KD(temperature=2.0)]}):
        with pytest.raises(kd.FingerprintMismatch, match="another run="):
            kd.train_student("mlp", train, store, seed=2, **{**settings, **other})


def test_subset_of_an_image_set_keeps_its_ids(data):
    train, _ = data
    store = kd.cache_teacher(network(), train, "store.zarr", mean=[0.5], std=[0.5], **QUIET)
    part = torch.utils.data.Subset(train, range(20, 40))
    batch = next(iter(kd.DistillationLoader(store, part, batch_size=10)))
    assert set(batch.sample_ids.tolist()) <= set(train.sample_ids[20:40].tolist())


def test_store_is_not_written_to_a_url(data):
    with pytest.raises(kd.KdpipeError, match="is a URL"):
        kd.cache_teacher(network(), data[0], "s3://bucket/x.zarr", mean=[0.5], std=[0.5], **QUIET)


def test_test_images_of_other_channels_are_refused(data):
    gray = kd.as_image_set(data[1])
    rgb = kd.load_dataset("digits", num_train=60, channels=3)[0]
    with pytest.raises(kd.KdpipeError, match="1 channels, the training images 3"):
        kd.train_student("cnn", rgb, test=gray, **TRAIN)
