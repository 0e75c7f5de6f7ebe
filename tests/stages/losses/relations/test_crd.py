"""CRD: against the authors' formulas in loops, its memory banks, and training."""

import math
from dataclasses import replace

import pytest
import torch
from support.loss_inputs import drawn, make_inputs
from torch.nn.functional import normalize

from kdpipe.stages.losses.inputs import DatasetInfo, Negatives
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.losses.relations.nce import Memory, NCELoss, log_z_of, nce_loss
from kdpipe.stages.targets.feature_spec import FeatureSpec

POOLED = FeatureSpec("b", "pooled")
NUM_SAMPLES, DIM = 50, 8
LABELS = torch.tensor([0, 1, 2, 1])
NEGATIVES = Negatives({POOLED: drawn(20, 6, seed=3)}, torch.arange(20) % 4, torch.arange(20) + 30)


def built(layers=(("a", "b"),), **keys):
    config = CRD(loss="crd", layers=layers, dim=DIM, **keys)
    torch.manual_seed(0)
    shapes = {path: (5,) for path, _ in layers}
    return config.build(shapes, {POOLED: (6,)}, DatasetInfo(NUM_SAMPLES, 4)).double()


def batch(student=None, teacher=None, negatives=NEGATIVES, labels=LABELS):
    student, teacher = drawn(4, 5, seed=1) if student is None else student, drawn(4, 6, seed=2)
    inputs = make_inputs(labels=labels, student={"a": student, "c": 2 * student}, teacher={POOLED: teacher})
    return replace(inputs, ranks=torch.tensor([7, 3, 40, 11])[: len(labels)], negatives=negatives)


def products(anchors, positives, negatives, is_negative):
    return [
        [math.exp(v @ w / 0.07) for w in (positive, *negatives[mask])]
        for v, positive, mask in zip(anchors, positives, is_negative, strict=True)
    ]


def z_of(values):
    return NUM_SAMPLES * sum(sum(row) / len(row) for row in values) / len(values)


def naive(anchors, positives, negatives, is_negative, z):
    """The authors' loss of one direction, sample by sample; Z as it was, or the first batch's where it is None."""
    values = products(anchors, positives, negatives, is_negative)
    z = z or z_of(values)
    losses = []
    for row in values:
        noise = (len(row) - 1) / NUM_SAMPLES
        loss = -math.log(row[0] / z / (row[0] / z + noise + 1e-7))
        losses.append(loss - sum(math.log(noise / (value / z + noise + 1e-7)) for value in row[1:]))
    return losses, z


def test_defaults_are_the_authors():
    config = CRD(loss="crd", layers=(("a", "b"),))
    assert (config.weight, config.dim, config.temperature, config.momentum) == (0.8, 128, 0.07, 0.5)
    assert (config.num_negatives, config.memory, config.per_sample) == (16384, "store", True)
    assert (config.student_layers(), config.required_features({})) == (("a",), (POOLED,))


@pytest.mark.parametrize("memory", ["store", "bank"])
def test_loss_matches_the_authors_formula_over_two_batches(memory):
    module = built(memory=memory)
    layer, inputs = module.layers[0], batch()
    is_negative = LABELS[:, None] != NEGATIVES.labels
    z_student = z_teacher = None
    for _ in range(2):
        with torch.no_grad():
            student = normalize(layer.student(inputs.student.features["a"]))
            teacher = normalize(layer.teacher(inputs.teacher.features[POOLED]))
            positives, negatives = teacher, normalize(layer.teacher(NEGATIVES.features[POOLED]))
            if memory == "bank":
                positives, negatives = layer.teachers.rows[inputs.ranks], layer.teachers.rows[NEGATIVES.ranks]
            rows = layer.students.rows
            if memory == "store" and z_student is None:
                z_student = z_of(products(student, rows[inputs.ranks], rows[NEGATIVES.ranks], is_negative))
            first, z_student = naive(student, positives, negatives, is_negative, z_student)
            second, z_teacher = naive(teacher, rows[inputs.ranks], rows[NEGATIVES.ranks], is_negative, z_teacher)
        loss = module(inputs)
        assert loss.tolist() == pytest.approx([a + b for a, b in zip(first, second, strict=True)], rel=1e-6)
        inputs = replace(inputs, student=replace(inputs.student, features={"a": drawn(4, 5, seed=9)}))


def test_the_loss_equals_the_formula_where_all_negatives_count():
    log_same, log_negatives = drawn(3, seed=1) - 4, drawn(3, 5, seed=2) - 4
    noise = 5 / NUM_SAMPLES
    same, other = log_same.exp(), log_negatives.exp()
    expected = -(same / (same + noise + 1e-7)).log() - (noise / (other + noise + 1e-7)).log().sum(1)
    all_samples = torch.ones(3, 5, dtype=torch.bool)
    assert torch.allclose(nce_loss(log_same, log_negatives, all_samples, NUM_SAMPLES), expected, rtol=1e-12)


def test_samples_of_the_anchors_class_are_not_negatives():
    log_same, log_negatives = drawn(2, seed=1), drawn(2, 5, seed=2)
    is_negative = torch.tensor([[True, False, True, True, False]] * 2)
    fewer = nce_loss(log_same, log_negatives[:, [0, 2, 3]], torch.ones(2, 3, dtype=torch.bool), NUM_SAMPLES)
    assert torch.allclose(nce_loss(log_same, log_negatives, is_negative, NUM_SAMPLES), fewer, rtol=1e-12)
    z = log_z_of(log_same, log_negatives[:, [0, 2, 3]], torch.ones(2, 3, dtype=torch.bool), NUM_SAMPLES)
    assert log_z_of(log_same, log_negatives, is_negative, NUM_SAMPLES).item() == pytest.approx(z.item())


def test_gradient_matches_finite_differences():
    leaves = [drawn(3, 4, seed=seed).requires_grad_() for seed in (1, 2)] + [drawn(5, 4, seed=3).requires_grad_()]
    contrast, is_negative = NCELoss(0.5, NUM_SAMPLES).double(), drawn(3, 5, seed=4) > -1
    contrast(leaves[0], leaves[1:], is_negative)  # Z is what it was at the first batch, and has no gradient
    assert torch.autograd.gradcheck(lambda anchors, *among: contrast(anchors, among, is_negative), leaves)


@pytest.mark.parametrize("memory", ["store", "bank"])
def test_embeddings_train_and_memories_have_no_gradient(memory):
    module, student = built(memory=memory), drawn(4, 5, seed=1).requires_grad_()
    module(batch(student)).mean().backward()
    assert student.grad.abs().sum() > 0
    assert all(weight.grad.abs().sum() > 0 for weight in module.parameters())
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_memory_update_changes_only_the_seen_rows():
    torch.manual_seed(0)
    memory = Memory(NUM_SAMPLES, DIM, 0.5)
    assert memory.rows.abs().max() <= math.sqrt(3 / DIM)
    before, seen = memory.rows.clone(), normalize(drawn(2, DIM, seed=1)).float()
    memory.update(torch.tensor([4, 9]), seen)
    assert torch.allclose(memory.rows[[4, 9]], normalize(before[[4, 9]] + seen))
    rest = [row for row in range(NUM_SAMPLES) if row not in {4, 9}]
    assert torch.equal(memory.rows[rest], before[rest])


def test_memory_is_not_updated_in_eval_mode():
    module = built(memory="bank").eval()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert torch.isfinite(module(batch())).all()
    assert all(torch.equal(before[name].nan_to_num(), buffer.nan_to_num()) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("memory", ["store", "bank"])
def test_resumed_loss_continues_like_an_uninterrupted_one(memory):
    module, resumed = built(memory=memory), built(memory=memory)
    module(batch())
    torch.nn.init.zeros_(resumed.layers[0].students.rows)
    resumed.load_state_dict(module.state_dict())
    later = batch(drawn(4, 5, seed=8))
    assert torch.equal(module(later), resumed(later))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), resumed.buffers(), strict=True))


def test_z_stays_that_of_the_first_batch():
    contrast = NCELoss(0.5, NUM_SAMPLES).double()
    is_negative = torch.ones(3, 5, dtype=torch.bool)
    sides = drawn(3, 4, seed=1), drawn(3, 4, seed=2), drawn(5, 4, seed=3)
    products = torch.cat([(sides[0] * sides[1]).sum(1, keepdim=True), sides[0] @ sides[2].T], 1) / 0.5
    contrast(sides[0], sides[1:], is_negative)
    expected = math.log(NUM_SAMPLES * products.exp().mean())
    assert contrast.log_z.item() == pytest.approx(expected)
    contrast(2 * sides[0], [2 * side for side in sides[1:]], is_negative)
    assert contrast.log_z.item() == pytest.approx(expected)


def test_pairs_are_summed_with_separate_memory_banks():
    module = built(layers=(("a", "b"), ("c", "b")))
    expected = [layer(batch(), NEGATIVES, path, POOLED) for layer, path in zip(built_pair(), ("a", "c"), strict=True)]
    assert torch.allclose(module(batch()), expected[0] + expected[1])


def built_pair():
    return built(layers=(("a", "b"), ("c", "b"))).layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", ["store", "bank"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_loss_and_gradient_are_finite_at_the_edges(scale, memory, dtype):
    module = built(memory=memory, temperature=0.01).float()
    with torch.no_grad():  # zero rows of features give zero rows of embeddings
        for name, bias in module.named_parameters():
            bias.mul_(not name.endswith("bias"))
    student = (scale * drawn(4, 5, seed=1)).to(dtype).requires_grad_()
    for _ in range(2):
        loss = module(batch(student))
        loss.mean().backward()
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(leaf.grad).all() for leaf in (student, *module.parameters()))


@pytest.mark.parametrize("memory", ["store", "bank"])
def test_batch_of_one_without_valid_negatives_is_finite(memory):
    module, student = built(memory=memory), drawn(1, 5, seed=1).requires_grad_()
    inputs = replace(batch(student, labels=LABELS[:1]), negatives=replace(NEGATIVES, labels=torch.zeros(20).long()))
    inputs = replace(inputs, teacher=replace(inputs.teacher, features={POOLED: drawn(1, 6, seed=2)}))
    loss = module(inputs)
    loss.sum().backward()
    assert loss.shape == (1,)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("memory", ["store", "bank"])
def test_training_reduces_the_loss_and_matches_samples(memory):
    """The student gets the teacher's inputs without its linear map: it must learn the map to match samples."""
    seen, teacher = drawn(40, 6, seed=1), drawn(40, 6, seed=1) @ drawn(6, 6, seed=2)
    config = CRD(loss="crd", layers=(("a", "b"),), dim=DIM, memory=memory)
    torch.manual_seed(0)
    module = config.build({"a": (5,)}, {POOLED: (6,)}, DatasetInfo(40, 40)).double()
    model = torch.nn.Linear(6, 5).double()
    optimizer = torch.optim.Adam([*model.parameters(), *module.parameters()], lr=0.01)
    all_samples = torch.arange(40)
    negatives = Negatives({POOLED: teacher}, all_samples, all_samples)
    losses = []
    for _ in range(120):
        inputs = make_inputs(labels=all_samples, student={"a": model(seen)}, teacher={POOLED: teacher})
        loss = module(replace(inputs, ranks=all_samples, negatives=negatives)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    layer = module.layers[0]
    found = (normalize(layer.student(model(seen))) @ normalize(layer.teacher(teacher)).T).argmax(1)
    assert (found == all_samples).float().mean() > 0.8


def test_batch_without_negatives_is_an_error():
    with pytest.raises(ValueError, match="negatives"):
        built()(batch(negatives=None))


def test_without_a_label_only_the_sample_itself_is_no_negative():
    labels, negatives = torch.tensor([0, -1, 2, 1]), replace(NEGATIVES, ranks=torch.arange(20))  # 3, 7 and 11 are there
    seen = []
    loss = built()
    loss.layers[0].of_student.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    loss(batch(labels=labels, negatives=negatives))
    assert torch.equal(seen[0][1], torch.arange(20) != 3)
    assert torch.equal(seen[0][0], negatives.labels != 0)
