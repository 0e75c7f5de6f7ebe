"""Fine-tuning continues with the adapters that trained with the student, cut to the channels that it kept."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, build

from kdpipe.stages.compress.fine_tune import FineTuneJob, _restore
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.kept_channels import kept_channels
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.distillation.adapters import KeptChannels, load_adapters, restore_adapters, save_adapters
from kdpipe.stages.errors import RunError
from kdpipe.stages.losses.distillation import build_distillation
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.features.review_kd import ReviewKD
from kdpipe.stages.losses.features.vid import VID
from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.relations.cc import CC
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.models.hooks import feature_shapes
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig

LAYERS = ("layer1", "layer2")
PAIRS = tuple((layer, layer) for layer in LAYERS)
TEACHER = {"layer1": (20, 8, 8), "layer2": (28, 4, 4)}
LOSSES = (Hint(layers=PAIRS), VID(layers=PAIRS), ReviewKD(layers=PAIRS), CC(layers=PAIRS), CRD(layers=PAIRS), KD())


def losses_for(shapes, losses=LOSSES, seed=0):
    teacher = {}
    for layer, shape in TEACHER.items():
        teacher |= {FeatureSpec(layer): shape, FeatureSpec(layer, size=shape[1:]): shape}
        teacher |= {FeatureSpec(layer, "pooled"): shape[:1]}
    ensemble = TeacherEnsemble(TeachersConfig(weights="learnable"), 2)
    return build_distillation(
        losses, shapes, (teacher, teacher), ensemble=ensemble, dataset=DatasetInfo(9, 5), seed=seed
    )


@pytest.fixture(scope="module")
def pruned():
    """Return a network, what pruning made of it, and the channels of two layers that were kept."""
    model = build("residual")
    made = prune(model, EXAMPLE, PruneConfig(ratio=0.4, round_to=1))
    return model, made, kept_channels(model, EXAMPLE, [*LAYERS, "stem.0", "fc"], made.removed)


@pytest.mark.parametrize(
    ("layer", "norm"), [("layer1", "layer1.1.bn2"), ("layer2", "layer2.0.shortcut.1"), ("stem.0", "stem.1")]
)
def test_kept_channels_are_those_of_the_norm_that_writes_them(pruned, layer, norm):
    model, made, kept = pruned
    before, after = (one.get_submodule(norm).weight for one in (model, made.model))
    assert len(after) < len(before) == kept[layer].width
    assert torch.equal(before[torch.tensor(kept[layer].channels)], after)


def test_layers_that_lost_nothing_or_are_joined_are_left_out(pruned):
    assert "fc" not in pruned[2]
    joined = torch.nn.Sequential(torch.nn.ModuleDict({"a": torch.nn.Conv2d(3, 4, 1), "b": torch.nn.Conv2d(3, 4, 1)}))
    joined[0].forward = lambda x: torch.cat([joined[0]["a"](x), joined[0]["b"](x)], 1)
    assert kept_channels(joined, EXAMPLE, ["0"], {"0.a": [1]}) == {}


def test_adapters_are_cut_to_the_kept_channels(pruned):
    model, made, kept = pruned
    before = losses_for(feature_shapes(model, LAYERS, IMAGE_SHAPE))
    shapes = feature_shapes(made.model, LAYERS, IMAGE_SHAPE)
    wide = [loss.with_widths_of(feature_shapes(model, LAYERS, IMAGE_SHAPE)) for loss in LOSSES]
    before.ensemble.scores.data += torch.tensor([1.0, 2.0])
    after = losses_for(shapes, wide, seed=1)
    assert restore_adapters(after, before.state_dict(), kept) == []
    assert torch.equal(before.ensemble.scores, after.ensemble.scores)
    channels = torch.tensor(kept["layer2"].channels)
    # What the kept channels alone give is the same: all others are zero in the unpruned network.
    maps = torch.rand(2, len(channels), 4, 4)
    whole = torch.zeros(2, kept["layer2"].width, 4, 4).index_copy(1, channels, maps)
    for name, path in (("hint_0", "pairs.1.adapter"), ("vid_1", "pairs.1.mean"), ("cc_3", "pairs.1.student")):
        one, other = (side.losses[name].loss.get_submodule(path).eval() for side in (before, after))
        torch.testing.assert_close(one(whole), other(maps))
    one, other = (side.losses["review_kd_2"].loss.fusions[1].eval() for side in (before, after))
    torch.testing.assert_close(one(whole, None, (4, 4))[0], other(maps, None, (4, 4))[0])
    assert torch.equal(
        before.losses["crd_4"].loss.layers[1].students.rows, after.losses["crd_4"].loss.layers[1].students.rows
    )


def test_losses_whose_adapters_do_not_fit_are_named(pruned):
    model, made, kept = pruned
    before = losses_for(feature_shapes(model, LAYERS, IMAGE_SHAPE))
    after = losses_for(feature_shapes(made.model, LAYERS, IMAGE_SHAPE), seed=1)
    fresh = {name: tensor.clone() for name, tensor in after.losses["hint_0"].state_dict().items()}
    only = {"layer1": kept["layer1"], "layer2": KeptChannels(7, [0])}
    assert restore_adapters(after, before.state_dict(), only) == ["hint_0", "vid_1", "review_kd_2", "cc_3", "crd_4"]
    assert all(torch.equal(fresh[name], tensor) for name, tensor in after.losses["hint_0"].state_dict().items())


def test_adapters_are_what_the_job_wrote(tmp_path):
    folder, losses = JobDir(tmp_path), losses_for({layer: TEACHER[layer] for layer in LAYERS})
    facts = save_adapters(folder, losses)
    assert load_adapters(folder) == {}  # the job is not finished
    folder.finish(RESULT | facts)
    assert load_adapters(folder).keys() == losses.state_dict().keys()
    losses.ensemble.scores.data += 1
    save_adapters(folder, losses)
    with pytest.raises(RunError, match=r"adapters.safetensors is not what its job wrote"):
        load_adapters(folder)


def test_losses_without_adapters_leave_no_file(tmp_path):
    losses = build_distillation(
        [KD()], {}, ({},), ensemble=TeacherEnsemble(TeachersConfig(), 1), dataset=DatasetInfo(9, 5), seed=0
    )
    assert save_adapters(JobDir(tmp_path), losses) == save_adapters(JobDir(tmp_path), None) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("adapters", "why"), [({}, "none were kept"), ({"losses.hint_0.x": EXAMPLE}, "do not fit")])
def test_adapters_that_start_from_random_are_told(tmp_path, adapters, why):
    messages = []
    monitor = RunMonitor(lambda event: messages.append(event.job))
    task = SimpleNamespace(distillation=losses_for({layer: TEACHER[layer] for layer in LAYERS}, LOSSES[:1]))
    job = FineTuneJob("pruned student", None, JobDir(tmp_path), TrainConfig(), adapters=adapters)
    _restore(task, job, SimpleNamespace(monitor=monitor))
    assert len(messages) == 1
    assert messages[0].startswith("pruned student: the adapters of hint_0 start from random, as ")
    assert why in messages[0]


RESULT = {
    "accuracy": 0.5,
    "best_accuracy": 0.5,
    "num_parameters": 1,
    "onnx_bytes": None,
    "onnx_agreement": None,
    "identity": {"weights_sha256": "0"},
    "wall_s": 1.0,
}
