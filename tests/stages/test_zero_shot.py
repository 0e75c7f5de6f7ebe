"""Zero-shot logits from class embeddings: the classes' order, and files that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.zero_shot import ZeroShot, zero_shot

CLASSES = torch.tensor([[0.0, 3.0], [2.0, 0.0], [1.0, 1.0]])
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(names: object = ("dog", "cat", "cow"), classes: torch.Tensor = CLASSES) -> str:
        path = tmp_path / "classes.safetensors"
        save_file({"text": classes}, path, {"names": json.dumps(names)} if names else None)
        return str(path)

    return write


def tower() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_logits_are_scaled_cosines_in_the_order_of_the_data(write):
    model = zero_shot(tower(), write(), 100.0, ("cat", "dog"), (2, 4, 4)).eval()
    images = torch.rand(3, 2, 4, 4)
    embeddings = F.normalize(images.mean((2, 3)), dim=1)
    wanted = 100 * embeddings @ torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T
    torch.testing.assert_close(model(images), wanted)
    with torch.no_grad(), extract_features(model, [PRE_LOGITS]) as extractor:
        torch.testing.assert_close(extractor(images).features[PRE_LOGITS], embeddings)
    assert isinstance(model, ZeroShot)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"names": ("dog", "cow", "hen")}, "1 of the data's 2 classes are not among the 3 of .*: cat"),
        ({"names": ("dog", "cat")}, "has 3 embeddings and 2 names"),
        ({"names": None}, "has no class names: write them as a JSON list"),
        ({"classes": torch.ones(3, 5)}, "embeddings of 5 numbers, and the network returns 2"),
        ({"classes": torch.ones(3, 2, 2)}, "must hold one tensor"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(write, change, sentence):
    with pytest.raises(RecipeError, match=sentence):
        zero_shot(tower(), write(**change), 100.0, ("cat", "dog"), (2, 4, 4))


def test_names_may_be_in_a_file_beside(write):
    path = write(names=None)
    Path(path).with_suffix(".json").write_text(json.dumps(["dog", "cat", "cow"]))
    assert torch.equal(
        zero_shot(tower(), path, 1.0, ("cow",), (2, 4, 4)).head.weight, F.normalize(torch.ones(1, 2), dim=1)
    )
