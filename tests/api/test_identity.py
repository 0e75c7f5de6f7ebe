"""Edited code and changed attributes of objects of the user's: no store or student of the old ones is returned."""

import importlib
import sys

import pytest
import torch
from support.device import DEVICE
from support.notebook import Notebook
from torch import nn

import kdpipe as kd
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.models.user_models import MODELS

pytestmark = pytest.mark.usefixtures("without_onnx")

QUIET = {"device": DEVICE, "progress": False}
TRAIN = {"epochs": 1, "batch_size": 32, **QUIET}
BLOCK = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
    def forward(self, images):
        return self.conv(images).relu().mean((2, 3))
"""
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.fc = Block(), nn.Linear(4, 10)
    def forward(self, images):
        return self.fc(self.block(images))
"""
LOSS = """
@kd.register_loss("of_cells")
def of_cells(student_logits, teacher_logits, *, margin: float = 0.0):
    return helper(student_logits - teacher_logits).mean(1)
"""


@pytest.fixture(scope="module")
def data():
    return kd.load_dataset("digits", num_train=64)


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A notebook in an empty folder; what it registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    for registry in (LOSSES, MODELS):
        monkeypatch.setattr(registry, "_registered", {})
    return Notebook(nn=nn, kd=kd, torch=torch)


def seeded(build):
    torch.manual_seed(0)
    return build()


def cache(model, data):
    return kd.cache_teacher(model, data[0], "store.zarr", mean=[0.5], std=[0.5], **QUIET)


def test_edited_cell_of_a_module_is_another_network(notebook, data):
    folders = []
    for block in (BLOCK, BLOCK, BLOCK.replace("relu", "tanh")):
        notebook.run(block)
        if not folders:
            notebook.run(NET)
        folders.append(kd.train_student(seeded(notebook["Net"]), data[0], test=data[1], **TRAIN).folder)
        if len(set(folders)) == 1:
            cache(seeded(notebook["Net"]), data)
    assert folders[0] == folders[1] != folders[2]
    with pytest.raises(kd.FingerprintMismatch, match=r"source_sha256: stored .* was edited"):
        cache(seeded(notebook["Net"]), data)


def test_reloaded_module_within_a_sequential_counts(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_block.py"
    file.write_text(f"from torch import nn\n{BLOCK}")
    module = importlib.import_module("own_block")
    cache(seeded(lambda: nn.Sequential(module.Block(), nn.Linear(4, 10))), data)
    file.write_text(file.read_text().replace("relu", "sigmoid"))
    importlib.reload(module)
    with pytest.raises(kd.FingerprintMismatch, match="source_sha256"):
        cache(seeded(lambda: nn.Sequential(module.Block(), nn.Linear(4, 10))), data)
    del sys.modules["own_block"]


def test_changed_attribute_is_another_network(notebook, data):
    notebook.run(BLOCK)
    notebook.run(
        NET.replace("__init__(self)", "__init__(self, scale=1.0)").replace(
            "self.block,", "self.scale = scale; self.block,"
        )
    )
    cache(seeded(notebook["Net"]), data)
    cache(seeded(notebook["Net"]), data)
    with pytest.raises(kd.FingerprintMismatch, match="structure_sha256"):
        cache(seeded(lambda: notebook["Net"](50.0)), data)


def test_helper_of_a_registered_network_counts(notebook, data):
    folders = []
    notebook.run(
        """
        @kd.register_model("of_cells")
        def build(num_classes):
            return nn.Sequential(Block(), nn.Linear(4, num_classes))
        """
    )
    for block in (BLOCK, BLOCK.replace("relu", "tanh")):
        notebook.run(block)
        folders.append(kd.train_student("of_cells", data[0], test=data[1], **TRAIN).folder)
    assert len(set(folders)) == 2


def student(data, loss):
    """Return the folder of a student that was trained with a loss."""
    store = seeded(
        lambda: kd.cache_teacher(kd.create_model("mlp", data[0]), data[0], "s.zarr", mean=[0], std=[1], **QUIET)
    )
    return kd.train_student("mlp", data[0], store, test=data[1], losses=[loss], **TRAIN).folder


def test_helper_and_closure_of_a_loss_count(notebook, data):
    folders = []
    for helper in ("abs", "abs", "square"):
        notebook.run(f"def helper(logits): return logits.{helper}()")
        if not folders:
            notebook.run(LOSS)
        folders.append(student(data, notebook["of_cells"]()))
    assert folders[0] == folders[1] != folders[2]

    def make(factor):
        @kd.register_loss("of_factory")
        def of_factory(student_logits, teacher_logits):
            return factor * (student_logits - teacher_logits).abs().mean(1)

        return of_factory()

    folders = [student(data, make(factor)) for factor in (1.0, 1.0, 1000.0)]
    assert folders[0] == folders[1] != folders[2]


def test_loss_that_fails_in_training_is_one_sentence(notebook, data):
    @kd.register_loss("of_luck")
    def of_luck(student_logits, teacher_logits):
        if len(student_logits) > 4:  # not when it is tried
            raise ValueError("out of luck")
        return (student_logits - teacher_logits).abs().mean(1)

    with pytest.raises(kd.KdpipeError, match=r"^the loss of_luck failed in training \(ValueError: out of luck\)"):
        student(data, of_luck())
