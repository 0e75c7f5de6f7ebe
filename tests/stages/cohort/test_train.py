"""Training of cohorts on bright squares: each method runs, resumes bit for bit, and leaves students as any other."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.device import DEVICE
from support.tiny_run import LOSSES, STUDENT, VIEWS, StopAfter, make_tiny_store, squares, tiny_context

from kdpipe.stages.cohort.config import CohortConfig, CohortMember
from kdpipe.stages.cohort.exchange import CohortPlan, build_task
from kdpipe.stages.cohort.network import build_cohort
from kdpipe.stages.cohort.train import ensemble_folder, member_folder, train_cohort, try_cohort
from kdpipe.stages.compress.external_student import load_external
from kdpipe.stages.context import model_normalization
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import ModelError, RecipeError, StoppedEarly
from kdpipe.stages.evaluation.evaluate import evaluate
from kdpipe.stages.export.trial import try_export
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.relations.rkd import RKD
from kdpipe.stages.losses.statistics.at import AT
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.joint_networks import Ensemble
from kdpipe.stages.runtime.events import WARNING, RunMonitor

OTHER = ModelConfig(name="cnn", args={"width": 3, "num_stages": 2})
BOTH = (CohortMember(model=STUDENT.model), CohortMember(model=OTHER))
FEATURES = (Hint(layers=(("stage2", "stage2"),)), AT(layers=(("stage1", "stage1"),)))
RELATIONS = RKD(layers=(("pre_logits", "pre_logits"),))
CONFIGS = {
    "dml": CohortConfig(members=BOTH, distill=(*FEATURES, RELATIONS)),
    "linear": CohortConfig(method="kdcl", combine="linear", members=3),
    "general": CohortConfig(method="kdcl", combine="general"),
    "one": CohortConfig(method="one", members=3, branch_at="stage2"),
    "codistillation": CohortConfig(method="codistillation"),
}


def context_of(folder, name="", monitor=None):
    changes = {"validation_set": squares(60, 3, "validation")} if name == "general" else {}
    return tiny_context(folder, monitor, train_set=squares(100, 0), **changes)


def train(folder, config, monitor=None, name=""):
    folder.mkdir(exist_ok=True)
    return train_cohort(CohortPlan(config, replace(STUDENT, export=False)), 0, context_of(folder, name, monitor))


def weights_of(folder, count):
    jobs = [*(member_folder(folder, number, 0) for number in range(count)), ensemble_folder(folder, 0)]
    return [load_file(job.model) for job in jobs]


def is_equal(one, other):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_cohort_resumes_bit_for_bit(name, tmp_path):
    config, count = CONFIGS[name], CONFIGS[name].num_members
    whole = train(tmp_path / "whole", config, name=name)
    pieces = 0
    while True:
        try:
            resumed = train(tmp_path / "pieces", config, RunMonitor(should_stop=StopAfter(4)), name)
            break
        except StoppedEarly:
            pieces += 1
    assert pieces > 1
    assert is_equal(weights_of(tmp_path / "whole", count), weights_of(tmp_path / "pieces", count))
    for one, other in zip(
        [*whole["members"], whole["ensemble"]], [*resumed["members"], resumed["ensemble"]], strict=True
    ):
        assert one["accuracy"] == other["accuracy"]
        assert one["best_accuracy"] == other["best_accuracy"]
    again = train(tmp_path / "whole", config, name=name)
    assert again == json.loads(json.dumps(whole))


def loaded(result, folder, context):
    """The network of a finished job, built as a recipe would from its record."""
    record = result["identity"]["architecture"]
    config = ModelConfig(name=record["model"], args=record["args"], weights=str(folder.model))
    return context.build_model(config, seed=5).to(DEVICE)


@pytest.mark.parametrize("config", [CohortConfig(members=BOTH), CONFIGS["one"]])
def test_members_and_ensemble_load_as_networks(config, tmp_path):
    found, context = train(tmp_path, config), context_of(tmp_path)
    test = context.evaluation(model_normalization(context.train_set, None, None, None))
    members = [loaded(one, member_folder(tmp_path, n, 0), context) for n, one in enumerate(found["members"])]
    ensemble = loaded(found["ensemble"], ensemble_folder(tmp_path, 0), context)
    for network, result in zip([*members, ensemble], [*found["members"], found["ensemble"]], strict=True):
        assert evaluate(network, test, context.device).value == result["accuracy"]
    images = torch.randn(4, 1, 8, 8).to(DEVICE)
    with torch.no_grad():
        logits = torch.stack([member.eval()(images) for member in members])
        if config.method == "dml":
            torch.testing.assert_close(ensemble.eval()(images), logits.mean(0))
        else:
            gates = ensemble.eval().gate(ensemble.trunk(images).mean((2, 3)))
            assert gates.shape == (4, 3)
            torch.testing.assert_close(ensemble(images), torch.einsum("kbc,bk->bc", logits, gates))
    try_export(ensemble, (1, 8, 8))
    lines = member_folder(tmp_path, 1, 0).metrics.read_text().splitlines()
    assert {"hard_labels", "peers"} <= json.loads(lines[-1])["losses"].keys()


def test_first_member_starts_as_the_student_alone(tmp_path):
    context = context_of(tmp_path)
    alone = build_student(STUDENT, 0, context)
    first, second = build_cohort(CohortConfig(), STUDENT, 0, context).members
    assert first.identity == alone.identity
    assert second.identity != first.identity


def test_members_learn_from_a_stored_teacher(tmp_path):
    context = tiny_context(tmp_path)
    store = make_tiny_store(context)
    students = [replace(STUDENT, model=member.model) for member in BOTH]
    specs = [open_distillation([store], LOSSES, student, {}, context) for student in students]
    for config in (CohortConfig(members=BOTH, with_teacher=True), CohortConfig(method="kdcl", with_teacher=True)):
        run = tmp_path / config.method
        run.mkdir()
        own = replace(context, run_dir=run)
        used = specs if config.method == "dml" else [specs[0]] * 2
        plan = CohortPlan(config, replace(STUDENT, export=False), used)
        task = build_task(plan, build_cohort(config, STUDENT, 0, own), 0, own)
        batch = next(task.stream(0, 16, epoch=1, step=0, epochs=2))
        assert len(batch.teachers) == (2 if config.own_views else 1)
        for number, teacher in enumerate(batch.teachers):
            stored = task.targets.batch((1 + number) % VIEWS.num_views, batch_indices(task, batch))[0]
            assert torch.equal(teacher.logits, stored.logits)
        if config.own_views:
            continue
        found = train_cohort(plan, 0, own)
        losses = json.loads(member_folder(run, 1, 0).metrics.read_text().splitlines()[-1])["losses"]
        assert {"hard_labels", "peers", "kd_0_stored", "hint_1_stored"} == losses.keys()
        assert found["members"][1]["adapters_sha256"]


def batch_indices(task, batch):
    """The positions of a batch's samples in the data set."""
    return torch.stack([(task.ranks == rank).nonzero()[0, 0] for rank in batch.ranks.cpu()])


@pytest.mark.parametrize("config", [CohortConfig(distill=(KD(),)), CohortConfig(method="kdcl", combine="linear")])
def test_micro_batches_train_the_same_cohort(config, tmp_path, monkeypatch):
    mlp = replace(STUDENT, model=ModelConfig(name="mlp"), export=False)  # without batch norm
    plan = CohortPlan(config, replace(mlp, train=replace(mlp.train, precision="float32")), [])
    warned = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        monitor = RunMonitor(lambda event: warned.append(event.job) if event.unit == WARNING else None)
        train_cohort(plan, 0, context_of(tmp_path / name, monitor=monitor))
        forward = Ensemble.forward

        def hungry(network, images, forward=forward):
            if network.training and len(images) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(network, images)

        monkeypatch.setattr(Ensemble, "forward", hungry)
    for one, other in zip(weights_of(tmp_path / "whole", 2), weights_of(tmp_path / "parts", 2), strict=True):
        assert all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-5) for key in one)
    assert sum("continuing with micro-batches of 16" in warning for warning in warned) == 1


def test_members_of_kdcl_see_different_views(tmp_path):
    context, config = context_of(tmp_path), CohortConfig(method="kdcl", members=3)
    task = build_task(CohortPlan(config, STUDENT), build_cohort(config, STUDENT, 0, context), 0, context)
    batch = next(task.stream(0, 16, epoch=1, step=0, epochs=2))
    views = batch.images.chunk(3, 1)
    indices = batch_indices(task, batch)
    for view, images in zip((1, 2, 0), views, strict=True):
        wanted = task.normalize(context.train_loader.get(ViewRequest(indices, view)).images)
        assert torch.equal(images, wanted)
    fresh = replace(task, fresh_views=True)
    seen = [view for epoch in range(4) for view in fresh.views_at(epoch)]
    assert len(set(seen)) == len(seen)


def test_member_is_taken_as_a_student_to_compress(tmp_path):
    found, context = train(tmp_path, CohortConfig()), context_of(tmp_path)
    fresh = build_student(STUDENT, 0, context)
    network = load_external(member_folder(tmp_path, 1, 0).model, fresh, context.train_set.class_names)
    assert network.identity == found["members"][1]["identity"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CohortConfig(method="kdcl", members=4), {}, "views.num_views is 3: set it to 4 or more"),
        (CohortConfig(method="kdcl", combine="general"), {}, "set data.validation_share"),
        (CohortConfig(method="one", branch_at="stage1"), {}, "nothing before it would be shared"),
        (CohortConfig(method="one", branch_at="nosuch"), {}, "branch_at = 'nosuch': .*no module 'nosuch'"),
        (CohortConfig(method="kdcl", distill=FEATURES), {}, "see different views"),
        (CohortConfig(method="one", branch_at="stage2", distill=FEATURES), {}, "learn from logits alone"),
        (CohortConfig(distill=(KD(store=1),)), {}, "not from a store"),
        (CohortConfig(), {"train": replace(STUDENT.train, compile=True)}, "cohorts are not compiled"),
        (CohortConfig(), {"train": replace(STUDENT.train, optimizer="dot")}, "'dot': its two momenta are for labels"),
    ],
)
def test_impossible_cohort_is_refused(config, changes, message, tmp_path):
    with pytest.raises((RecipeError, ModelError), match=message):
        try_cohort(CohortPlan(config, replace(STUDENT, **changes)), context_of(tmp_path))
    assert not (tmp_path / "students").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combine": "naive"}, "combine belongs to method = 'kdcl'"),
        ({"method": "one"}, "needs branch_at"),
        ({"method": "one", "branch_at": "x", "members": BOTH}, "are of one network"),
        ({"members": 9}, "at most 8"),
        ({"members": 1}, "at least 2"),
    ],
)
def test_contradicting_keys_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        CohortConfig(**settings)
