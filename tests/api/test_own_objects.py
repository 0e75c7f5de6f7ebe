"""Networks and data sets of the user's own, as Python objects."""

import copy
import textwrap

import numpy as np
import pytest
import torch
from support.device import DEVICE
from torch import nn
from torch.utils.data import TensorDataset

import kdpipe as kd

QUIET = {"device": DEVICE, "progress": False}


class Net(nn.Module):
    """A small network, as a user writes it."""

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, 3)

    def forward(self, images):
        return self.fc(self.body(images).mean((2, 3)))


def squares(num, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    images = torch.randint(0, 60, (num, 1, 6, 6), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, : 2 * (int(label) + 1)] += 150
    return TensorDataset(images, labels)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data():
    return squares(96, 0), squares(48, 1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Net()


def test_own_network_and_dataset_go_through_all_stages(data, network):
    train, test = data
    trained = kd.train_teacher(network, train, test=test, epochs=3, batch_size=32, **QUIET)
    assert trained.accuracy > 0.5
    store = kd.cache_teacher(network, train, "store.zarr", views=kd.Views(2, ["RandomHorizontalFlip"]), **QUIET)
    assert kd.verify(store).ok
    result = kd.train_student(Net(4), train, store, test=test, epochs=3, batch_size=32, **QUIET)
    images = torch.stack([test[0][0], test[1][0]])
    assert result.bundle(images).shape == (2, 3)
    small = kd.compress(
        result, prune={"ratio": 0.5, "round_to": 1}, int8=False, prune_train={"epochs": 1, "batch_size": 32}, **QUIET
    )
    assert small.model(torch.zeros(1, 1, 6, 6)).shape == (1, 3)
    assert small.networks["pruned"].num_parameters < result.num_parameters


def test_repeated_call_returns_what_it_has_done(data, network):
    train, test = data
    first = kd.train_teacher(network, train, test=test, epochs=2, batch_size=32, **QUIET)
    weights = copy.deepcopy(network.state_dict())
    second = kd.train_teacher(network, train, test=test, epochs=2, batch_size=32, **QUIET)
    assert (second.folder, second.figures) == (first.folder, first.figures)
    assert all(torch.equal(network.state_dict()[key], weights[key]) for key in weights)


def test_student_object_stays_as_it_is(data, network):
    train, test = data
    before = copy.deepcopy(network.state_dict())
    kd.train_student(network, train, test=test, epochs=1, batch_size=32, **QUIET)
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in before)


def test_teacher_without_normalization_is_refused(data, network):
    with pytest.raises(kd.KdpipeError, match="input normalization of this Net is unknown"):
        kd.cache_teacher(network, data[0], "store.zarr", **QUIET)
    store = kd.cache_teacher(network, data[0], "store.zarr", mean=[0.5], std=[0.5], **QUIET)
    assert store.manifest.identity.teacher["normalization"] == {"mean": [0.5], "std": [0.5]}


class Both(Net):
    """Returns logits and features in both modes."""

    def forward(self, images):
        return {"hidden": self.body(images), "logits": super().forward(images)}


@pytest.mark.usefixtures("without_onnx")
def test_main_logits_of_several_outputs_are_used(data, network):
    both = Both()
    both.load_state_dict(network.state_dict())
    one = kd.cache_teacher(network, data[0], "one.zarr", mean=[0.5], std=[0.5], **QUIET)
    with pytest.warns(UserWarning, match="Both returns dict: its main logits are used"):
        other = kd.cache_teacher(both, data[0], "other.zarr", mean=[0.5], std=[0.5], **QUIET)
    assert np.array_equal(one.read_view("logits", 0), other.read_view("logits", 0))
    assert type(both(torch.zeros(1, 1, 6, 6))) is dict
    result = kd.train_student(both, data[0], other, test=data[1], epochs=1, batch_size=32, **QUIET)
    kd.cache_teacher(result.model, data[0], "again.zarr", **QUIET)
    assert type(kd.load_student(result, model=both).model(torch.zeros(1, 1, 6, 6))) is torch.Tensor


@pytest.mark.parametrize("kind", [Net, Both])
def test_a_given_network_keeps_its_modes_and_device(data, kind):
    (images, labels), model = data[0].tensors, kind()
    with torch.no_grad():
        logits = Net.forward(model.eval(), (images / 255 - 0.5) / 0.5)
    model.train().body.eval()  # as for frozen batch norms
    kd.cache_teacher(model, data[0], "store.zarr", mean=[0.5], std=[0.5], **QUIET)
    report = kd.evaluate(model, data[0], normalize=(0.5, 0.5), device=DEVICE)
    assert report.top1 == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=0.05)
    assert (model.training, model.body.training, model.fc.weight.device.type) == (True, False, "cpu")


def test_edited_class_is_another_network(tmp_path, monkeypatch, data):
    source = textwrap.dedent("""
        from torch import nn
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(36, 3)
            def forward(self, images):
                return self.fc(images.flatten(1)) * SCALE
    """)
    monkeypatch.syspath_prepend(tmp_path)
    for number, scale in enumerate((1, 2)):
        (tmp_path / f"own_net_{number}.py").write_text(f"SCALE = {scale}\n{source}")
    stores = []
    for number in range(2):
        module = __import__(f"own_net_{number}")
        torch.manual_seed(0)
        model = module.Own()
        model.__class__.__module__ = f"own_net_{number}"
        stores.append(kd.cache_teacher(model, data[0], f"store{number}.zarr", mean=[0.5], std=[0.5], **QUIET))
    first, second = (store.manifest.identity.teacher["architecture"]["source_sha256"] for store in stores)
    assert first != second


def test_changed_network_of_kdpipe_is_the_users_own(data):
    model = kd.create_model("cnn", kd.as_image_set(data[0]), width=4)
    stores = []
    for number in range(2):
        stores.append(kd.cache_teacher(model, data[0], f"store{number}.zarr", mean=[0.5], std=[0.5], **QUIET))
        model.fc = nn.Sequential(model.fc, nn.Tanh())
    names = [store.manifest.identity.teacher["architecture"]["model"] for store in stores]
    assert names[0] == "cnn"
    assert names[1].startswith("object:")


def test_store_of_another_network_is_refused(data, network):
    kd.cache_teacher(network, data[0], "store.zarr", mean=[0.5], std=[0.5], **QUIET)
    torch.manual_seed(1)
    with pytest.raises(kd.FingerprintMismatch, match="weights_sha256"):
        kd.cache_teacher(Net(), data[0], "store.zarr", mean=[0.5], std=[0.5], **QUIET)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda train, test: kd.train_teacher("cnn", train, test=test), "build it with kdpipe.create_model"),
        (lambda train, test: kd.create_model("cnnn", train), "did you mean 'cnn'"),
        (lambda train, test: kd.create_model("cnn", train, widht=3), "no argument 'widht'"),
        (lambda train, test: kd.train_student(3, train, test=test), "a name or a torch.nn.Module, not int"),
        (lambda train, test: kd.train_student("cnn", train, test=test, epoch=3), "did you mean 'epochs'"),
        (lambda train, test: kd.train_student("cnn", train, test=test, losses=[kd.losses.KD()]), "losses need a store"),
        (lambda train, test: kd.train_student("cnn", train, "none.zarr", test=test), "none.zarr"),
        (lambda train, test: kd.compress("student.onnx"), "result of train_student, not str"),
        (lambda train, test: kd.load_dataset("digit"), "digits"),
        (lambda train, test: kd.load_dataset("digits", num_tain=3), "num_train"),
        (lambda train, test: kd.Views(0), "num_views"),
        (lambda train, test: kd.verify("none.zarr"), "none.zarr"),
        (lambda train, test: kd.report("."), "not a run folder"),
        (lambda train, test: kd.load_student("none"), "no file none"),
    ],
)
def test_wrong_input_is_one_sentence(data, wrong, message):
    with pytest.raises(kd.KdpipeError, match=message) as caught:
        wrong(*data)
    assert "\n" not in str(caught.value)


def test_image_set_is_a_torch_dataset():
    train, _ = kd.load_dataset("digits", num_train=50)
    image, label = train[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.uint8
    assert label in range(10)
    assert len(train) == 50
    assert np.array_equal(train[3][0], train.images[3])


def test_callbacks_see_trainings_and_may_end_them(data, network):
    train, test = data
    seen = []

    class Stop(kd.Callback):
        def on_epoch_end(self, state):
            seen.append((state.job, state.epoch))
            if state.epoch == 2:
                state.stop()

    settings = {"epochs": 5, "batch_size": 32, "run": "run", **QUIET}
    result = kd.train_student(network, train, test=test, callbacks=[Stop(), "csv"], **settings)
    assert [epoch for _, epoch in seen] == [1, 2]
    assert result.figures["num_epochs"] == len(result.history) == 2
    assert result.figures["stopped_by"] == "Stop"
    assert len((result.folder / "metrics.csv").read_text().splitlines()) == 3
    assert kd.train_student(network, train, test=test, **settings).figures == result.figures


def test_classes_of_test_images_are_those_of_training(data):
    train, test = data
    few = torch.utils.data.Subset(test, [0, 1, 3, 4])  # without the last class
    result = kd.train_student(Net(), train, test=few, epochs=1, batch_size=32, **QUIET)
    assert [row["name"] for row in result.figures["examined"]["per_class"]] == ["0", "1", "2"]
    images = kd.as_image_set(train, image_size=4, class_names=["a", "b", "c"])
    assert images.image_size == (4, 4)
    assert images.class_names == ("a", "b", "c")


def test_losses_by_name_and_entry_are_those_of_recipes(data, network):
    train, test = data
    store = kd.cache_teacher(network, train, "store.zarr", mean=[0.5], std=[0.5], **QUIET)
    settings = {"test": test, "epochs": 1, "batch_size": 32, **QUIET}
    results = [
        kd.train_student("mlp", train, store, losses=[loss], model_args={"hidden": [4]}, **settings)
        for loss in ("kd", {"loss": "kd"}, kd.losses.KD())
    ]
    assert len({result.folder for result in results}) == 1
    with pytest.raises(kd.KdpipeError, match="did you mean 'kd'"):
        kd.train_student("mlp", train, store, losses=["kdd"], **settings)


def test_evaluate_measures_what_training_measured(data, network):
    train, test = data
    trained = kd.train_teacher(network, train, test=test, epochs=1, batch_size=32, **QUIET)
    assert kd.evaluate(network, test, device=DEVICE).top1 == trained.accuracy
    result = kd.train_student(Net(), train, test=test, epochs=1, batch_size=32, **QUIET)
    assert kd.evaluate(result.bundle, test, device=DEVICE).top1 == result.accuracy
    with pytest.raises(kd.KdpipeError, match="normalize="):
        kd.evaluate(Net(), test, device=DEVICE)


def test_given_weights_need_scaling_and_expected_accuracy(data, network):
    train, test = data
    trained = kd.train_teacher(network, train, test=test, epochs=3, batch_size=32, mean=0.25, std=0.5, **QUIET)
    torch.save(network.state_dict(), "net.pt")
    given = Net()
    given.load_state_dict(torch.load("net.pt", weights_only=True))
    with pytest.raises(kd.KdpipeError, match="100 % were expected"):
        kd.cache_teacher(given, train, "s.zarr", test=test, mean=0.25, std=0.5, expected_accuracy=100, **QUIET)
    expected = 100 * trained.accuracy
    kd.cache_teacher(given, train, "s.zarr", test=test, mean=0.25, std=0.5, expected_accuracy=expected, **QUIET)
    made = kd.create_model("cnn", train, width=2)
    torch.save(made.state_dict(), "cnn.pt")
    loaded = kd.create_model("cnn", train, width=2, weights="cnn.pt")
    with pytest.raises(kd.KdpipeError, match=r"give normalize=\(mean, std\)"):
        kd.cache_teacher(loaded, train, "t.zarr", **QUIET)


def test_labels_of_a_data_set_may_be_left_out():
    images, labels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2
    few = kd.as_image_set(torch.utils.data.TensorDataset(images, labels), labels=4)
    assert torch.bincount(few.labels[few.labeled]).tolist() == [2, 2]
    assert not kd.as_image_set(few, labels="none").has_labels
