"""The losses of a cohort against the papers' formulas written a second time, and where gradients go."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from support.tiny_run import STUDENT, squares, tiny_context

from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.exchange import CohortPlan, build_task
from kdpipe.stages.cohort.losses import ramp
from kdpipe.stages.cohort.network import build_cohort, renewal
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.schedules import TrainProgress
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.distributed import SINGLE

KDCL = ("naive", "linear", "min_logit", "general")


class Setting:
    """A cohort, its task, and one batch of epoch 1."""

    def __init__(self, folder, config, epochs=2):
        changes = {"validation_set": squares(60, 3, "validation")} if config.combine == "general" else {}
        self.context = tiny_context(folder, **changes)
        self.config = config
        self.cohort = build_cohort(config, STUDENT, 0, self.context)
        self.task = build_task(CohortPlan(config, STUDENT), self.cohort, 0, self.context)
        self.network = self.cohort.joint.model
        torch.manual_seed(1)
        with torch.no_grad():  # logits that differ clearly
            for parameter in self.network.parameters():
                parameter.mul_(2.0)
        self.batch = next(self.task.stream(0, 16, epoch=1, step=0, epochs=epochs))

    def run(self):
        """Return the losses by name, the members' logits and the joint network's."""
        with extract_features(self.network, self.task.hooked) as student:
            output = student(self.batch.images)
        count = self.config.num_members
        logits = [output.features[f"members.{number}"] for number in range(count)]
        return self.task.losses(output, self.batch), logits, output.logits

    def values(self):
        """Return the same, the losses as numbers."""
        losses, *outputs = self.run()
        return {name: float(loss.detach()) for name, loss in losses.items()}, *outputs


def kl(target, logits, temperature):
    """The mean over samples of T^2 KL(softmax(target / T) || softmax(logits / T)), in float64."""
    p, log_q = softmax(target / temperature, axis=1), log_softmax(logits / temperature, axis=1)
    return temperature**2 * (p * (log_softmax(target / temperature, axis=1) - log_q)).sum(1).mean()


def cross_entropy(logits, labels):
    return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()


def as_numpy(tensors):
    return [one.detach().double().numpy() for one in tensors]


def labels_of(setting):
    return setting.batch.hard.labels.numpy()


@pytest.mark.parametrize("members", [2, 3])
def test_dml_is_the_mean_divergence_from_the_others(members, tmp_path):
    setting = Setting(tmp_path, CohortConfig(members=members))
    losses, logits, _ = setting.values()
    z = as_numpy(logits)
    for i in range(members):
        wanted = sum(kl(z[j], z[i], 1.0) for j in range(members) if j != i) / (members - 1)
        assert losses[f"peers_{i}"] == pytest.approx(wanted, rel=1e-5)
        assert losses[f"hard_labels_{i}"] == pytest.approx(cross_entropy(z[i], labels_of(setting)), rel=1e-5)
    assert len(losses) == 2 * members


@pytest.mark.parametrize("how", KDCL)
def test_kdcl_learns_from_the_combined_logits(how, tmp_path):
    setting = Setting(tmp_path, CohortConfig(method="kdcl", combine=how, weight=0.7))
    if how == "general":
        setting.task.exchange.weights.copy_(torch.tensor([1.4, -0.4]))
    losses, logits, _ = setting.values()
    (first, second), labels = as_numpy(logits), labels_of(setting)
    rows = np.arange(len(labels))
    own = [-log_softmax(z, axis=1)[rows, labels] for z in (first, second)]
    if how == "naive":
        target = np.where((own[0] <= own[1])[:, None], first, second)
    elif how == "min_logit":
        target = np.minimum(*(z - z[rows, labels][:, None] for z in (first, second)))
    elif how == "general":
        target = 1.4 * first - 0.4 * second
    else:  # by a fine grid over the only free weight
        grid = np.linspace(0, 1, 4001)[:, None, None]
        mixed = grid * first + (1 - grid) * second
        best = (-log_softmax(mixed, axis=2)[:, rows, labels]).argmin(0)
        target = mixed[best, rows]
    for i, z in enumerate((first, second)):
        tolerance = 1e-2 if how == "linear" else 1e-5
        assert losses[f"peers_{i}"] == pytest.approx(0.7 * kl(target, z, 2.0), rel=tolerance)


@pytest.mark.parametrize(
    ("epoch", "epochs", "wanted"), [(0, 300, math.exp(-5)), (40, 300, math.exp(-1.25)), (80, 300, 1), (200, 300, 1)]
)
def test_ramp_of_one_is_that_of_the_paper(epoch, epochs, wanted):
    assert ramp(epoch, 80 / 300 * epochs) == pytest.approx(wanted, rel=1e-12)


def test_one_learns_from_its_gated_ensemble(tmp_path):
    config = CohortConfig(method="one", members=3, branch_at="stage2", ramp_epochs=4)
    setting = Setting(tmp_path, config)
    losses, logits, ensemble = setting.values()
    z, (e,), labels = as_numpy(logits), as_numpy([ensemble]), labels_of(setting)
    weight = math.exp(-5 * (1 - 1 / 4) ** 2)
    assert losses["hard_labels_ensemble"] == pytest.approx(cross_entropy(e, labels), rel=1e-5)
    for i in range(3):
        assert losses[f"peers_{i}"] == pytest.approx(weight * kl(e, z[i], 3.0), rel=1e-5)
    gates = setting.network.gate(torch.randn(8, 4))
    assert gates.shape == (8, 3)
    torch.testing.assert_close(gates.sum(1), torch.ones(8))
    assert [type(layer).__name__ for layer in setting.network.gate] == ["Linear", "BatchNorm1d", "ReLU", "Softmax"]


def test_codistillation_learns_from_the_last_epoch(tmp_path):
    setting = Setting(tmp_path, CohortConfig(method="codistillation", members=3, temperature=2.0))
    exchange = setting.task.exchange
    renew = renewal(setting.network, exchange, None, SINGLE)
    renew(setting.network, 1)
    before = [{name: one.clone() for name, one in peer.state_dict().items()} for peer in exchange.peers]
    with torch.no_grad():  # the members have learned since
        for parameter in setting.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    renew(setting.network, 1)  # a training that is resumed in this epoch
    for peer, state in zip(exchange.peers, before, strict=True):
        assert all(torch.equal(peer.state_dict()[name], one) for name, one in state.items())
    losses, logits, _ = setting.values()
    with torch.no_grad():
        peers = as_numpy([peer(setting.batch.images) for peer in exchange.peers])
    for i, z in enumerate(as_numpy(logits)):
        mean = sum(softmax(peers[j] / 2.0, axis=1) for j in range(3) if j != i) / 2
        assert losses[f"peers_{i}"] == pytest.approx(kl(2.0 * np.log(mean), z, 2.0), rel=1e-5)
    renew(setting.network, 2)
    assert all(
        torch.equal(one, other)
        for peer, member in zip(exchange.peers, setting.network.members, strict=True)
        for one, other in zip(peer.state_dict().values(), member.state_dict().values(), strict=True)
    )


def test_codistillation_begins_with_labels_alone(tmp_path):
    setting = Setting(tmp_path, CohortConfig(method="codistillation"))
    setting.batch = replace(setting.batch, progress=TrainProgress(0, 2))
    assert setting.values()[0]["peers_0"] == 0


@pytest.mark.parametrize(
    "config",
    [
        CohortConfig(distill=(Hint(layers=(("stage2", "stage2"),)),)),
        CohortConfig(method="codistillation"),
        *(CohortConfig(method="kdcl", combine=how) for how in KDCL),
    ],
)
def test_no_gradient_flows_into_peers(config, tmp_path):
    setting = Setting(tmp_path, config)
    losses, _, _ = setting.run()
    own, other = (list(member.parameters()) for member in setting.network.members)
    learned = [name for name in losses if name.endswith("_0") and not name.startswith("hard_labels")]
    assert len(learned) == (2 if config.distill else 1)
    for name in learned:
        assert any(g is not None for g in torch.autograd.grad(losses[name], own, retain_graph=True, allow_unused=True))
        found = torch.autograd.grad(losses[name], other, retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in found)


def test_gate_learns_from_labels_alone(tmp_path):
    setting = Setting(tmp_path, CohortConfig(method="one", branch_at="stage2"))
    losses, _, _ = setting.run()
    gate = list(setting.network.gate.parameters())
    found = torch.autograd.grad(losses["peers_0"], gate, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in found)
    (weight, *_) = torch.autograd.grad(losses["hard_labels_ensemble"], gate)
    assert weight.abs().sum() > 0
