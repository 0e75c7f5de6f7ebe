"""Arguments in their several forms, and one sentence for what is none of them."""

import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from support.device import DEVICE
from torch import nn
from torch.utils.data import Subset, TensorDataset

import kdpipe as kd
from kdpipe.stages.models.normalization import Normalization

QUIET = {"device": DEVICE, "progress": False}
ONE = {"epochs": 1, "batch_size": 32}
HALF = {"mean": [0.5], "std": [0.5]}


def function_of_logits(student_logits, teacher_logits):
    return (student_logits - teacher_logits).abs().mean(1)


def squares(num, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    images = torch.randint(0, 60, (num, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images[torch.arange(num), 0, 2 * labels] += 150
    return TensorDataset(images, labels)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return data, a store and a distilled student, each made once."""
    folder = tmp_path_factory.mktemp("arguments")
    train, test = kd.as_image_set(squares(96, 0)), kd.as_image_set(squares(48, 1), "test")
    store = kd.cache_teacher(network(), train, folder / "store.zarr", normalize=(0.5, 0.5), **QUIET)
    student = kd.train_student(
        "cnn", train, store, test=test, model_args={"width": 4}, run=folder / "run", **ONE, **QUIET
    )
    return train, test, store, student


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train_student(made, *store, **arguments):
    train, test, own, _ = made
    stores = store or (own,)
    return kd.train_student("cnn", train, *stores, test=test, **{**ONE, **QUIET, **arguments})


def cache(made, teacher=None, **arguments):
    return kd.cache_teacher(teacher or network(), made[0], "store.zarr", **{**QUIET, **arguments})


def loader(made, **arguments):
    return kd.DistillationLoader(made[2], made[0], **arguments)


WRONG = {
    # arguments that were ignored
    "layers": (lambda made: cache(made, layers=("1",), **HALF), "'layers' in Python: give features="),
    "store": (lambda made: cache(made, store="other.zarr", **HALF), "'store' in Python: give path"),
    "int8": (lambda made: kd.compress(made[3], int8="int4"), "int8 is 'int4': give True, False, or settings"),
    "no store": (lambda made: train_student(made, []), "store is an empty list"),
    "store of another type": (lambda made: train_student(made, 3), "a store is a TargetStore, a path or a URL, not 3"),
    "mean of 255": (lambda made: cache(made, mean=[127], std=[60]), "not those of pixels in"),
    "std of 255": (lambda made: kd.train_teacher(network(), made[0], test=made[1], mean=0, std=60), "divide those"),
    "options' mean": (lambda made: train_student(made, options={"mean": [9], "std": [9]}), "not those of pixels in"),
    "std 0": (lambda made: cache(made, normalize=(0.5, 0)), "standard deviations above 0"),
    "mean alone": (lambda made: cache(made, mean=0.5), "must be given together"),
    "two scalings": (lambda made: cache(made, normalize=(0.5, 0.5), **HALF), "must be given together"),
    "scaling": (lambda made: kd.evaluate(network(), made[1], normalize=0.5), "normalize is 0.5: give .mean, std."),
    "channels": (lambda made: loader(made, normalize=([0.5] * 3, [1.0] * 3)), "do not fit images of 1 channels"),
    "its channels": (lambda made: loader(made, normalize=Normalization((0.5,) * 3, (0.5,) * 3)), "do not fit images"),
    "num_workers": (lambda made: cache(made, num_workers=-1, **HALF), "num_workers is -1: it must be a whole number"),
    "loader's workers": (lambda made: loader(made, num_workers=-1), "num_workers is -1"),
    "batch_size": (lambda made: loader(made, batch_size=16.0), "batch_size is 16.0: it must be a whole number"),
    "loader's seed": (lambda made: loader(made, seed="a"), "seed is 'a'"),
    "seed": (lambda made: train_student(made, seed=0.5), "seed is 0.5"),
    "options of an ImageSet": (lambda made: kd.as_image_set(made[0], image_size=4), "is converted already: image_size"),
    # images
    "float images": (lambda made: made[3].bundle(torch.zeros(2, 1, 6, 6)), r"uint8 \[B, 1, H, W\], not float32"),
    "one image": (lambda made: made[3].bundle(torch.zeros(1, 6, 6, dtype=torch.uint8)), "needs a batch axis"),
    "image channels": (lambda made: made[3].bundle(torch.zeros(2, 3, 6, 6, dtype=torch.uint8)), r"\[2, 3, 6, 6\]"),
    "no images": (lambda made: made[3].bundle("x"), "the images are str"),
    # results
    "evaluate a name": (lambda made: kd.evaluate("x", made[1]), "to evaluate must be a torch.nn.Module"),
    "teacher's name": (lambda made: cache(made, teacher="cnn"), "the teacher must be a torch.nn.Module"),
    "load_student": (lambda made: kd.load_student(3), "path is 3: give a path"),
    "onnx": (lambda made: kd.load_student("student.onnx"), "load the .safetensors file"),
    "report": (lambda made: kd.report(3), "run is 3: give a path"),
    # lists
    "loss class": (lambda made: train_student(made, losses=[kd.losses.KD]), r"not KD: build it, KD\(\)"),
    "function": (lambda made: train_student(made, losses=function_of_logits), "decorate it with kdpipe.register_loss"),
    "no loss": (lambda made: train_student(made, losses=[3]), "a loss is an object of kdpipe.losses"),
    "callback class": (lambda made: train_student(made, callbacks=[kd.Callback]), r"build it, Callback\(\)"),
    "callback function": (lambda made: train_student(made, callbacks=print), "not print: derive a class"),
    "features": (lambda made: cache(made, features=[3], **HALF), "features are module paths such as 'stage2', not 3"),
    # views
    "list of views": (lambda made: cache(made, views=["RandomCrop"], **HALF), r"views are kdpipe.Views\(num_views"),
    "number of views": (lambda made: kd.train_student("cnn", made[0], test=made[1], views=3), "views are kdpipe.Views"),
    "one operation": (lambda made: kd.Views(2, "RandomCrop"), r"operations are a list, as in \['RandomCrop'\]"),
    "mix": (lambda made: kd.Views(mix={"name": "MixUp"}), "MixConfig has no setting 'name'; it takes mixup_alpha"),
    # settings
    "train": (lambda made: train_student(made, options={"train": {"epochs": 1}}), "'train' in Python: give its keys"),
    "seeds": (lambda made: train_student(made, seeds=[0, 1]), "'seeds' in Python: give seed="),
    "options": (lambda made: train_student(made, options=3), "options is 3: give a dict"),
    "model_args": (lambda made: train_student(made, model_args=3), "model_args is 3: give a dict"),
    "compress epochs": (lambda made: kd.compress(made[3], epochs=1), "prune_train={'epochs': ...}"),
    "compress steps": (lambda made: kd.compress(made[3], steps=["prune"]), "give prune= and int8="),
    "prune_train": (lambda made: kd.compress(made[3], prune_train=1), "prune_train is 1: give a dict"),
    "prune": (lambda made: kd.compress(made[3], prune=[0.5]), r"prune is \[0.5\]: give the share"),
    "prune's train": (lambda made: kd.prune(made[3], train=1), "train is 1: give a dict"),
    # files
    "run is a file": (lambda made: train_student(made, run="file"), "file is no folder"),
    "run under a file": (lambda made: train_student(made, run="file/run"), "file is no folder"),
    "empty run": (lambda made: train_student(made, run=""), "run is '': give a path"),
    "store under a file": (lambda made: kd.cache_teacher(network(), made[0], "file/s.zarr", **HALF), "is no folder"),
    "export": (lambda made: made[3].export("folder.onnx"), "a folder: name a file"),
    "export under a file": (lambda made: made[3].export("file/s.onnx"), "file is no folder"),
    "html": (lambda made: kd.report(made[3], html="folder.onnx"), "a folder: name a file"),
    # devices
    "no device": (lambda made: cache(made, device=None, **HALF), "device is None: give 'auto'"),
    "device's number": (lambda made: kd.evaluate(network(), made[1], device=0), "device is 0: give 'auto'"),
    "device": (lambda made: cache(made, device="gpu", **HALF), "device is 'gpu'"),
    "loader's device": (lambda made: loader(made, device="gpu"), "device is 'gpu'"),
    "absent GPU": (lambda made: loader(made, device="cuda:99"), "device is 'cuda:99', and torch sees"),
    "torch's device": (lambda made: cache(made, device=torch.device("cuda:99"), **HALF), "device is 'cuda:99', and"),
    # positions
    "epoch": (lambda made: loader(made).set_epoch(-1), "epoch is -1"),
    "state": (lambda made: loader(made).load_state_dict({}), "wanted seed, epoch and step"),
    "missing features": (lambda made: loader(made, features="1"), r"kdpipe.cache_teacher\(..., features=\['1'\]\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_one_sentence(made, name, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    call, message = WRONG[name]
    with pytest.raises(kd.KdpipeError, match=message) as caught:
        call(made)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


@pytest.mark.parametrize("losses", [None, (), "kd", {"loss": "kd"}, kd.losses.KD(), [kd.losses.KD()]])
@pytest.mark.parametrize("number", [int, np.int64])
def test_single_loss_none_and_numpy_integers_are_accepted(made, losses, number):
    student = made[3]
    arguments = {"epochs": number(1), "batch_size": number(32), "seed": number(0), "run": student.job.run}
    again = train_student(made, losses=losses, model_args={"width": number(4)}, **arguments)
    assert again.figures == student.figures


def test_single_callback_and_feature_are_accepted(made):
    seen = []

    class Count(kd.Callback):
        def on_epoch_end(self, state):
            seen.append(state.epoch)

    store = cache(made, features="1:pooled", **HALF)
    assert store.layers
    train_student(made, callbacks=Count())
    assert train_student(made, run="run", callbacks="csv").folder.joinpath("metrics.csv").exists()
    assert seen == [1]


SCALINGS = [(0.5, 0.5), ([0.5], [0.5]), (torch.tensor([0.5]), np.array(0.5)), Normalization((0.5,), (0.5,))]


@pytest.mark.parametrize("normalize", SCALINGS, ids=str)
def test_scaling_has_one_form_everywhere(made, normalize):
    test = made[1]
    wanted = {"mean": [0.5], "std": [0.5]}
    store = cache(made, normalize=normalize)
    assert store.manifest.identity.teacher["normalization"] == wanted
    assert loader(made, normalize=loader(made, normalize=normalize).normalize).normalize.to_json() == wanted
    assert kd.evaluate(network(), test, normalize=normalize, device=DEVICE).top1 >= 0


def test_scaling_of_a_training_is_that_given(made):
    train, test, _, _ = made
    trained = kd.train_teacher(network(), train, test=test, mean=0.5, std=[0.25], **ONE, **QUIET)
    assert trained.figures["identity"]["normalization"] == {"mean": [0.5], "std": [0.25]}
    assert train_student(made, normalize=(0.5, [0.25])).bundle.normalize == Normalization((0.5,), (0.25,))


def test_loaded_networks_remember_their_scaling(made):
    train, test, _, student = made
    teacher = kd.train_teacher(network(), train, test=test, **ONE, **QUIET)
    for result in (student, teacher):
        assert kd.evaluate(result, test, device=DEVICE).top1 == result.accuracy
        assert kd.evaluate(result.model, test, device=DEVICE).top1 == result.accuracy
    for given in (student, student.folder):
        loaded = kd.load_student(given)
        assert kd.evaluate(loaded, test, device=DEVICE).top1 == student.accuracy
        assert kd.evaluate(loaded.model, test, device=DEVICE).top1 == student.accuracy
    identities = []
    for number, given in enumerate((student, kd.load_student(student.folder))):  # a student as the next teacher
        store = kd.cache_teacher(given, train, f"store{number}.zarr", **QUIET)
        identities.append(store.manifest.identity.teacher)
    assert identities[0] == identities[1]
    assert identities[0]["architecture"]["model"] == "cnn"
    assert kd.cache_teacher(student.model, train, "store2.zarr", **QUIET).manifest.identity.teacher["normalization"]


def test_teacher_of_other_images_is_refused(made):
    others = kd.load_dataset("digits", num_train=20)[0]
    with pytest.raises(kd.KdpipeError, match="does not fit data set digits: it has .*num_classes 3, wanted 10"):
        kd.cache_teacher(made[3], others, "store.zarr", **QUIET)


def test_results_are_reported_and_hashable(made, tmp_path):
    student = made[3]
    assert kd.report(student).rows == kd.report(student.job.run).rows
    assert kd.report(student, html="new/page.html").rows
    assert (tmp_path / "new" / "page.html").stat().st_size
    assert len({student, student}) == 1


def test_export_of_a_deleted_folder_says_so(made):
    result = train_student(made, run="run")
    shutil.rmtree("run")
    with pytest.raises(kd.KdpipeError, match="of this network is gone"):
        result.export("student.onnx")


def test_loader_can_be_pickled(made):
    before, after = (next(iter(one)) for one in (loader(made), pickle.loads(pickle.dumps(loader(made)))))
    assert all(torch.equal(before[key], after[key]) for key in ("images", "labels", "teacher_logits"))


class Named(TensorDataset):
    classes = np.array(["a", "b", "c"])


def test_classes_may_be_an_array():
    assert kd.as_image_set(Named(*squares(6, 0).tensors)).class_names == ("a", "b", "c")
    assert kd.as_image_set(Subset(Named(*squares(6, 0).tensors), [0, 1])).class_names == ("a", "b", "c")


def test_labels_from_one_are_asked_for_once():
    images, labels = squares(6, 0).tensors
    dataset = TensorDataset(images, labels + 1)
    with pytest.warns(UserWarning, match="they start at 1: subtract 1"):
        kd.as_image_set(dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.as_image_set(dataset)


def test_unequal_sizes_name_the_argument():
    class Unequal(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.zeros(1, 6 + index // 3, 6, dtype=torch.uint8), 0

    unequal = kd.as_image_set(Unequal())
    assert unequal.image_size is None
    with pytest.raises(kd.KdpipeError, match=r"Unequal have different sizes: give image_size=\(H, W\)"):
        kd.create_model("cnn", unequal)
    assert kd.as_image_set(Unequal(), image_size=6).image_size == (6, 6)
