"""CAT-KD against its formula in float64, and the class activation maps that it compares."""

import pytest
import torch
import torch.nn.functional as F
from support.loss_inputs import assert_finite, build_loss, drawn

from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.losses.statistics.cat_kd import CATKD, cat_kd_loss
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.hooks import extract_features, feature_shapes
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.resolve import smallest_feature

LAYERS = (("a", "b"),)
STUDENT, TEACHER = drawn(8, 10, 8, 8, seed=1), drawn(8, 10, 4, 4, seed=2)
IMAGE_SHAPE = (1, 8, 8)


def average_network(name="cnn_average", **args):
    args = {"width": 4, "num_stages": 2} | args
    return build_model(ModelConfig(name=name, args=args), num_classes=10, in_channels=1, image_size=(8, 8), seed=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_is_the_squared_error_of_pooled_maps(size, normalize):
    pooled = [F.adaptive_avg_pool2d(maps, size) for maps in (STUDENT, TEACHER)]
    if normalize:
        pooled = [F.normalize(maps, dim=(2, 3)) for maps in pooled]
    config = CATKD(layers=LAYERS, size=size, normalize=normalize)
    module, inputs = build_loss(config, {"a.cam": STUDENT}, {"b.cam": F.adaptive_avg_pool2d(TEACHER, size)})
    torch.testing.assert_close(module(inputs).mean(), F.mse_loss(*pooled))


def test_maps_are_the_classifiers_weights_at_each_position():
    """Their mean is the logits without the bias; the gradient reaches the classifier, too."""
    model, images = average_network(), drawn(4, *IMAGE_SHAPE, seed=3).float()
    with extract_features(model.eval(), ["stage2", "stage2.cam"]) as extractor:
        outputs = extractor(images)
    maps = outputs.features["stage2.cam"]
    torch.testing.assert_close(maps.mean((2, 3)) + model.fc.bias, outputs.logits)
    expected = torch.einsum("bdhw,cd->bchw", outputs.features["stage2"], model.fc.weight)
    torch.testing.assert_close(maps, expected)
    cat_kd_loss(maps, torch.zeros_like(maps)).sum().backward()
    assert model.fc.weight.grad.abs().sum() > 0 and model.fc.bias.grad is None


def test_maps_may_be_overwritten_in_place():
    class Rectified(torch.nn.Sequential):
        def forward(self, images):
            return self[2](self[1](self[0](images)).mean((2, 3)))

    model = Rectified(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 10))
    with extract_features(model, ["0.cam"]) as extractor:
        outputs = extractor(drawn(4, *IMAGE_SHAPE, seed=3).float())
    (outputs.features["0.cam"].square().sum() + outputs.logits.sum()).backward()
    assert model[0].weight.grad.isfinite().all()


def test_stored_maps_are_pooled_to_two_by_two():
    (feature,) = CATKD(layers=LAYERS).required_features({"a.cam": (10, 8, 8)})
    assert smallest_feature(feature, (10, 4, 4)) == feature == FeatureSpec("b.cam", size=(2, 2))
    assert feature.array == "features-2x2/b.cam"
    assert CATKD(layers=LAYERS).required_features({"a.cam": (10, 1, 1)}) == (FeatureSpec("b.cam", size=(1, 1)),)


def test_other_layers_and_classes_are_errors():
    with pytest.raises(ModelError, match=r"'stage1.cam' needs maps of the 8 features .* these are \[4, 8, 8\]"):
        feature_shapes(average_network(), ["stage1.cam"], IMAGE_SHAPE)
    with pytest.raises(RecipeError, match=r"of shape \[10, 8, 8\].*of shape \[7, 2, 2\]: choose the last maps"):
        build_loss(CATKD(layers=LAYERS), {"a.cam": STUDENT}, {"b.cam": TEACHER[:, :7, :2, :2]})


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_loss_and_gradient_are_finite(dtype, normalize):
    student = (60 * drawn(1, 2, 2, 2, seed=1)).to(dtype)
    student[0, 1] = 0
    student.requires_grad_()
    loss = cat_kd_loss(student, torch.zeros(1, 2, 2, 2, dtype=torch.float16), normalize=normalize)
    assert loss.dtype == torch.float32
    assert_finite(loss.mean(), student)
