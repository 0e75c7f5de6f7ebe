"""SimKD's student: its logits, frozen classifier, files, and pruning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.distillation.classifier_reuse import add_projector, as_linear, reuse_classifier
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.models.hooks import extract_features

IMAGE_SHAPE = (3, 16, 16)
NUM_CLASSES = 7
CONFIG = SimKD(loss="simkd", layers=(("layer3", "layer3"),))


def network(name, seed=0):
    return build_model(ModelConfig(name=name), num_classes=NUM_CLASSES, in_channels=3, image_size=(16, 16), seed=seed)


def images(count=4):
    return torch.randn(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


def joined(student="resnet8", config=CONFIG, teacher="wrn_16_2", seed=0):
    """A student with the classifier of a teacher of 128 channels, and that classifier."""
    classifier = as_linear(linear_head(network(teacher, seed=9), IMAGE_SHAPE))
    return reuse_classifier(network(student), config, IMAGE_SHAPE, classifier, seed=seed), classifier


@pytest.mark.parametrize(
    ("student", "layer", "path"),
    [
        ("resnet8", "layer3", "fc"),
        ("resnet8", "layer3.0", "fc"),
        ("wrn_16_1", "relu", "fc"),
        ("vgg8", "block4", "classifier"),
        ("mobilenet_v2", "conv2", "classifier"),
        ("mobilenet_v2", "conv2.2", "classifier.0"),
    ],
)
def test_logits_are_the_classifier_on_the_pooled_projection(student, layer, path):
    config = SimKD(loss="simkd", layers=((layer, "layer3"),), classifier=path)
    model, classifier = joined(student, config)
    model.eval()
    with torch.no_grad(), extract_features(model, [layer]) as extractor:
        outputs = extractor(images())
    projected = outputs.features[layer]
    assert projected.shape[1] == classifier.in_features
    assert torch.allclose(outputs.logits, classifier(projected.mean((2, 3))), atol=1e-5)


def test_classifier_is_copied_and_frozen():
    model, classifier = joined()
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    assert torch.equal(model.fc.weight, classifier.weight)
    assert model.fc.weight.data_ptr() != classifier.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in model.fc.parameters())
    assert classifier.weight.requires_grad
    learning = [parameter for name, parameter in model.named_parameters() if not name.startswith("fc.")]
    assert all(parameter.grad is not None for parameter in learning)
    assert model.fc.weight.grad is None


def test_the_projector_has_the_papers_widths():
    model, _ = joined()
    convolutions = [each for each in model.layer3.projector if isinstance(each, nn.Conv2d)]
    assert [(each.in_channels, each.out_channels, each.kernel_size[0]) for each in convolutions] == [
        (64, 64, 1),
        (64, 64, 3),
        (64, 128, 1),
    ]


def test_projector_depends_on_the_seed_not_the_global_rng():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (joined(seed=seed)[0].layer3.projector[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_go_to_a_file_and_back_strictly():
    model, _ = joined()
    model(images())  # moves the running statistics
    again = add_projector(network("resnet8", seed=5), CONFIG, IMAGE_SHAPE, num_features=128, num_classes=NUM_CLASSES)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.eval()(images()), model.eval()(images()))
    assert not again.fc.weight.requires_grad


def test_a_classifier_without_bias_stays_without():
    classifier = nn.Linear(12, NUM_CLASSES, bias=False)
    model = reuse_classifier(network("resnet8"), CONFIG, IMAGE_SHAPE, classifier, seed=0)
    assert model.fc.bias is None
    again = add_projector(network("resnet8"), CONFIG, IMAGE_SHAPE, num_features=12, num_classes=NUM_CLASSES, bias=False)
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(training):
    model = reuse_classifier(
        network("resnet8").train(training), CONFIG, IMAGE_SHAPE, nn.Linear(12, NUM_CLASSES), seed=0
    )
    assert {module.training for module in model.modules()} == {training}


def test_unknown_path_error_has_the_nearest():
    with pytest.raises(ModelError, match=r"'layer33'; did you mean 'layer3'"):
        joined(config=SimKD(loss="simkd", layers=(("layer33", "layer3"),)))
    with pytest.raises(ModelError, match="no module 'fcc'"):
        joined(config=SimKD(loss="simkd", layers=(("layer3", "layer3"),), classifier="fcc"))


def test_layer_must_output_maps():
    with pytest.raises(RecipeError, match=r"the student's flatten outputs \[64\] per sample, expected a map"):
        joined(config=SimKD(loss="simkd", layers=(("flatten", "layer3"),)))


@pytest.mark.parametrize("layer", ["layer2", "layer3.0.bn2"])
def test_failing_projector_leaves_the_student_unchanged(layer):
    student = network("resnet8")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = SimKD(loss="simkd", layers=((layer, "layer3"),))
    with pytest.raises(RecipeError, match=f"does not run with a projector of 12 channels after {layer}"):
        reuse_classifier(student, config, IMAGE_SHAPE, nn.Linear(12, NUM_CLASSES), seed=0)
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_student_can_be_pruned_and_rebuilt_from_its_widths():
    model, _ = joined()
    example = torch.zeros(1, *IMAGE_SHAPE)
    pruned = prune(model, example, PruneConfig(ratio=0.5)).model
    assert pruned.eval()(images()).shape == (4, NUM_CLASSES)
    assert pruned.layer3.body[0].conv1.out_channels == 32
    again = add_projector(network("resnet8"), CONFIG, IMAGE_SHAPE, num_features=128, num_classes=NUM_CLASSES)
    apply_widths(again, record_widths(pruned)).load_state_dict(pruned.state_dict(), strict=True)
    assert torch.equal(again.eval()(images()), pruned.eval()(images()))
    assert not again.fc.weight.requires_grad


def test_excluded_projector_keeps_its_width_when_pruned():
    model, classifier = joined()
    pruned = prune(model, torch.zeros(1, *IMAGE_SHAPE), PruneConfig(ratio=0.5, exclude=("layer3.projector.6",))).model
    assert pruned.layer3.projector[6].out_channels == 128
    assert pruned.layer3.projector[3].out_channels == 32
    assert torch.equal(pruned.fc.weight, classifier.weight)
    assert not pruned.fc.weight.requires_grad
