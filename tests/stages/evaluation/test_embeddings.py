"""Embeddings are judged by their nearest neighbors and by a linear probe."""

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from torch import nn

from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.data.measures import agreement
from kdpipe.stages.data.tasks import EMBEDDING
from kdpipe.stages.evaluation.embeddings import embeddings_of, evaluate_neighbors, with_probe
from kdpipe.stages.evaluation.evaluate import Evaluation, evaluate
from kdpipe.stages.evaluation.knn import KNN, MAX_COMPARED, mutual_knn, num_compared
from kdpipe.stages.evaluation.linear_probe import LinearProbe, fit_probe
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.tokens import HEADLESS


def clusters(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors [N, 6] around one direction a class, far from 0, and their labels, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 3
    noise = torch.randn(num_images, 6, generator=generator)
    return 5 + F.one_hot(labels, 6) + 0.4 * noise, labels


def test_neighbors_vote_by_their_cosine():
    knn = KNN(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([2, 2, 0]), num_classes=3)
    votes = knn(torch.tensor([[4.0, 0.0]])).exp()
    assert votes[0].tolist() == pytest.approx([torch.tensor(-1 / 0.07).exp().item(), 0, 2], abs=1e-6)
    many = KNN(torch.eye(30), torch.arange(30) % 2, num_classes=2)
    assert many.k == 20


def test_the_probe_minimizes_the_penalized_cross_entropy():
    vectors, labels = clusters(49, seed=0)  # too few to choose a penalty
    probe = fit_probe(vectors, labels, 3)
    scale = (vectors - vectors.mean(0)).square().mean().sqrt()
    weight, bias = (one.double().requires_grad_() for one in (probe.weight, probe.bias))
    loss = F.cross_entropy(F.linear(vectors.double(), weight, bias), labels)
    loss = loss + probe.l2 / 2 * (weight * scale).square().sum()
    for gradient, one in zip(torch.autograd.grad(loss, (weight, bias)), (weight, bias), strict=True):
        assert gradient.abs().max() < 1e-4 * one.abs().max()


def test_the_penalty_is_chosen_on_images_held_out():
    vectors, labels = clusters(60, seed=1)
    vectors = torch.cat([vectors, torch.randn(60, 200, generator=torch.Generator().manual_seed(2))], 1)
    assert fit_probe(vectors, labels, 3).l2 == fit_probe(vectors.clone(), labels, 3).l2
    assert fit_probe(vectors, labels, 3).l2 > fit_probe(*clusters(600, seed=3), 3).l2 / 100


class Tower(nn.Module):
    """Embeddings [B, 3] that tell the classes of `image_set`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("scale", nn.Parameter(torch.ones(())))
        setattr(self, HEADLESS, True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * images.mean((2, 3))


def evaluation(num_images: int) -> Evaluation:
    labels = torch.arange(num_images) % 3
    images = (F.one_hot(labels, 3) * 200).to(torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    image_set = ImageSet("made", "test", images, labels, torch.arange(num_images), ("a", "b", "c"))
    return Evaluation(ImageLoader(image_set, DEVICE), Normalization((0.0,) * 3, (1.0,) * 3))


def test_without_a_classifier_accuracy_is_the_probes():
    model = Tower().to(DEVICE).eval()
    assert embeddings_of(model, evaluation(6)).vectors.shape == (6, 3)
    assert not model.training
    test, record = with_probe(model, evaluation(30), evaluation(9))
    assert isinstance(test.head, LinearProbe)
    assert evaluate(model, test, DEVICE).to_json()["accuracy"] == 1.0
    assert record["knn"] == {"accuracy": 1.0, "k": 20, "num_images": 30}
    assert record["linear_probe"]["accuracy"] == 1.0


def test_epochs_are_evaluated_by_neighbors():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False)).to(DEVICE)
    nn.init.zeros_(model[2].weight)
    test = evaluation(9)
    assert evaluate(model, test, DEVICE).value == pytest.approx(1 / 3)
    assert evaluate_neighbors(model, test, DEVICE, labeled=evaluation(30)).value == 1.0


def test_shared_neighbors_are_those_of_both_networks():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(61, 5, generator=generator)
    student = torch.cat([teacher[:, :3], torch.randn(61, 4, generator=generator)], 1)
    shares, difference = mutual_knn(teacher, student)
    cosines = [(F.normalize(one, dim=1) @ F.normalize(one, dim=1).T).double().numpy() for one in (teacher, student)]
    wanted = []
    for row in range(61):
        near = [{*sorted(set(range(61)) - {row}, key=lambda one: -each[row, one])[:6]} for each in cosines]
        wanted.append(len(near[0] & near[1]) / 6)
    assert shares.tolist() == pytest.approx(wanted)
    assert 0.1 < shares.mean() < 0.9
    assert difference == pytest.approx(((cosines[0] - cosines[1]) ** 2).mean(), rel=1e-5)
    assert mutual_knn(teacher, 3 * teacher)[0].tolist() == [1.0] * 61


@pytest.mark.parametrize(("num", "compared"), [(1, (1, 1)), (2, (2, 1)), (101, (101, 10)), (9999, (MAX_COMPARED, 20))])
def test_few_images_have_few_neighbors(num, compared):
    assert num_compared(num) == compared
    assert len(mutual_knn(torch.ones(num, 2), torch.ones(num, 3))[0]) == compared[0]


def test_embeddings_agree_by_their_cosine():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert agreement(EMBEDDING, first, second) == pytest.approx((1 + 0.5**0.5) / 2)
