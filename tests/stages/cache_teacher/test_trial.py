"""Tests of how the teacher is computed: what a trial finds, what a store records, and what resumes with it."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from support.device import DEVICE, needs_cpu
from support.made_store import folder_bytes
from support.tiny_run import CACHE, LAYERS, TEACHER, VIEWS, StopAfter, make_tiny_store, subset, tiny_context
from support.trials import later_is_faster
from torch import nn

from kdpipe.pipeline.commands.store.info import print_store_info, read_store_info
from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher import cache, choice, inference, trial
from kdpipe.stages.cache_teacher.estimate import plan_cache
from kdpipe.stages.cache_teacher.inference import forward
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.cache_teacher.recheck import recompute
from kdpipe.stages.cache_teacher.repair import repair
from kdpipe.stages.compute import settings, threads
from kdpipe.stages.compute.settings import ComputeSettings
from kdpipe.stages.compute.trial import choose
from kdpipe.stages.errors import ModelError, RecipeError, RunError, StoppedEarly
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.feature_spec import INPUT_GRADIENT, FeatureSpec
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import FingerprintMismatch, open_store, read_store_manifest, row_order

FAST = dataclasses.replace(CACHE, precision="bfloat16", memory_format="channels_last", max_kl=1e-2)


@pytest.fixture(autouse=True)
def hardware(monkeypatch):
    """A CPU with bfloat16, whatever this one has."""
    monkeypatch.setattr(settings, "has_bfloat16", lambda: True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("computed")
    make_tiny_store(tiny_context(folder))
    return folder


@pytest.fixture
def always_a_trial(monkeypatch):
    """Every job is large, and bfloat16, the only fast precision, is faster than float32."""
    monkeypatch.setattr(trial, "WORTH_A_TRIAL", {DEVICE.type: 1.0})
    monkeypatch.setattr(trial, "fast_precisions", lambda device: ("bfloat16",))
    monkeypatch.setattr(trial, "is_worth_a_trial", lambda *_: True)
    monkeypatch.setattr(trial, "time_on_one_thread", later_is_faster)


def setup_of(run, **changes):
    context = tiny_context(run, **changes)
    return load_teacher(TEACHER, 0, context), context


@pytest.mark.parametrize(("precision", "memory_format"), [("float32", "channels_last"), ("bfloat16", "channels_last")])
def test_stored_equals_recomputed(run, tmp_path, precision, memory_format):
    teacher, context = setup_of(run)
    config = dataclasses.replace(FAST, precision=precision, memory_format=memory_format, dtype="float32")

    strides = [parameter.stride() for parameter in teacher.model.parameters()]
    cache_teacher(config, tmp_path / "store.zarr", teacher, LAYERS, context)
    store = open_store(tmp_path / "store.zarr")
    assert [parameter.stride() for parameter in teacher.model.parameters()] == strides
    order = row_order(context.train_set.sample_ids.numpy(), VIEWS.seed)
    own, view = ComputeSettings(precision, memory_format), 1
    ids = context.train_set.sample_ids[order]
    images = context.renderer.render_batch(context.train_set.images[order].to(DEVICE), ids, view)
    own.place(teacher.model)
    with torch.no_grad(), extract_features(teacher.model, ["stage2"]) as extractor, own.active(context.device):
        outputs = [extractor(own.place_images(part)) for part in teacher.normalize(images).split(CACHE.batch_size)]
    logits = torch.cat([part.logits.float() for part in outputs]).cpu().numpy()
    features = torch.cat([part.features["stage2"].float() for part in outputs]).cpu().numpy()
    assert np.array_equal(store.read_view("logits", view), logits)
    assert np.array_equal(store.read_view("features/stage2", view), features)
    assert store.manifest.identity.compute == own.to_json()


def test_resumed_and_repaired_equal_uninterrupted(run, tmp_path):
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    teacher, context = setup_of(run)
    cache_teacher(FAST, one, teacher, LAYERS, context)
    stopped, waiting = setup_of(run, monitor=RunMonitor(should_stop=StopAfter(12)))
    with pytest.raises(StoppedEarly):
        cache_teacher(FAST, other, stopped, LAYERS, waiting)
    # "auto" takes what the store records
    assert cache_teacher(CACHE, other, teacher, LAYERS, context)["num_units_computed"] > 0
    assert folder_bytes(one) == folder_bytes(other)
    report = recompute(other, teacher, context, 50, 0)
    assert not report.differing and report.largest_error < 0.2
    (other / "logits/c/1/0/0").write_bytes(b"damaged")
    (other / "zarr.json").write_text("{}")
    found, left, num_units = repair(CACHE, other, teacher, LAYERS, context)
    assert found.damaged and not left.damaged and num_units == 1
    assert read_store_manifest(other).identity == read_store_manifest(one).identity
    assert (other / "logits/c/1/0/0").read_bytes() == (one / "logits/c/1/0/0").read_bytes()


@pytest.mark.usefixtures("traced")
def test_a_compiled_teacher_fills_the_same_store(run, tmp_path):
    one, other = tmp_path / "one.zarr", tmp_path / "other.zarr"
    compiled, plain = (dataclasses.replace(CACHE, dtype="float32", compile=value) for value in (True, False))
    teacher, context = setup_of(run)
    assert cache_teacher(compiled, one, teacher, LAYERS, context)["compute"]["compile"]
    cache_teacher(plain, other, teacher, LAYERS, context)
    for name in ("logits", "features/stage2"):  # traced, not fused: the same operations
        assert np.array_equal(open_store(one).read_view(name, 1), open_store(other).read_view(name, 1))
    with pytest.raises(FingerprintMismatch, match=r"compute\.compile: stored False, wanted True"):
        cache_teacher(compiled, other, teacher, LAYERS, context)


def test_extended_equals_uninterrupted(run, tmp_path):
    teacher, context = setup_of(run)
    fewer = dataclasses.replace(context, views=dataclasses.replace(VIEWS, num_views=1))
    cache_teacher(FAST, tmp_path / "grown.zarr", teacher, LAYERS, fewer)
    cache_teacher(CACHE, tmp_path / "grown.zarr", teacher, LAYERS, context)
    cache_teacher(FAST, tmp_path / "whole.zarr", teacher, LAYERS, context)
    grown, whole = open_store(tmp_path / "grown.zarr"), open_store(tmp_path / "whole.zarr")
    assert grown.manifest.identity == whole.manifest.identity
    for name in ("logits", "features/stage2"):
        assert np.array_equal(grown.read_view(name, 2), whole.read_view(name, 2))


@pytest.mark.usefixtures("always_a_trial")
def test_a_trial_takes_the_fastest_that_is_faithful(run, tmp_path, capsys):
    teacher, context = setup_of(run)
    config = CacheConfig(shard_bytes=4096, max_kl=1e-2)
    cache_teacher(config, tmp_path / "fast.zarr", teacher, LAYERS, context)
    info = read_store_info(tmp_path / "fast.zarr")
    fast = {"precision": "bfloat16", "memory_format": "channels_last", "compile": False, "folded": True}
    assert info["compute"] == fast
    assert not recompute(tmp_path / "fast.zarr", teacher, context, 20, 0).differing
    found = info["trial"]
    assert found["device"] == DEVICE.type and found["batch_size"] in trial.BATCH_SIZES and found["num_images"] == 18
    assert 0 < found["kl"]["1"] < 1e-2 and found["kl"]["20"] < found["kl"]["1"]
    assert 0 < found["features"]["features/stage2"] < trial.MAX_FEATURE_ERROR
    print_store_info(info)
    shown = r"computed in  bfloat16, channels_last, folded batch norms on c\w+; batches of \d+; against float32: KL "
    assert re.search(shown, capsys.readouterr().out)
    plan = plan_cache(CacheConfig(shard_bytes=4096), tmp_path / "fast.zarr", teacher, LAYERS, context, trained=True)
    assert plan["compute"]["precision"] == "bfloat16" and plan["compute"]["batch_size"] == found["batch_size"]
    # The store of the test images is computed as the training images' is.
    few = dataclasses.replace(context, train_set=subset(context.train_set, 20))
    figures = cache_teacher(config, tmp_path / "test.zarr", teacher, [], few, like=tmp_path / "fast.zarr")
    assert figures["compute"] == info["compute"]


@pytest.mark.usefixtures("always_a_trial")
def test_a_trial_keeps_float32_where_bfloat16_loses(run, tmp_path):
    teacher, context = setup_of(run)
    with torch.no_grad():
        teacher.model.fc.bias.add_(1000)  # bfloat16 rounds away what logits of a thousand differ by
    config = CacheConfig(shard_bytes=4096, memory_format="contiguous", dtype="float32")
    cache_teacher(config, tmp_path / "exact.zarr", teacher, [], context)
    manifest = read_store_manifest(tmp_path / "exact.zarr")
    assert manifest.identity.compute == {}
    assert "its KL divergence from float32 is" in manifest.trial["dropped"]["bfloat16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "bfloat16", "max_kl": 1e-9},
            r"in bfloat16: its KL divergence .* nats at T = 1 .*raise cache.max",
        ),
        pytest.param(
            {"precision": "tf32"},
            r"cache.precision = 'tf32': this cpu computes float32 and bfloat16 in hardware",
            marks=needs_cpu("GPUs compute in TF32"),
        ),
    ],
)
def test_a_precision_that_cannot_be_is_refused(run, tmp_path, changes, message):
    teacher, context = setup_of(run)
    with pytest.raises((RecipeError, ModelError), match=message):
        cache_teacher(dataclasses.replace(CACHE, **changes), tmp_path / "store.zarr", teacher, LAYERS, context)
    assert not (tmp_path / "store.zarr").exists()


class OwnType(nn.Module):
    """Refuses half precision, as code does that mixes types."""

    def forward(self, images):
        if torch.is_autocast_enabled(DEVICE.type):
            raise RuntimeError("expected scalar type Float")
        return images.mean((1, 2, 3))[:, None] * torch.arange(4.0, device=DEVICE)


@pytest.mark.usefixtures("always_a_trial")
def test_a_network_that_does_not_run_drops_out(run, tmp_path):
    teacher, context = setup_of(run)
    own = dataclasses.replace(teacher, model=nn.Sequential(OwnType(), nn.Linear(4, 4)).to(DEVICE).eval())
    cache_teacher(CacheConfig(shard_bytes=4096), tmp_path / "own.zarr", own, [], context)
    manifest = read_store_manifest(tmp_path / "own.zarr")
    assert manifest.identity.compute["precision"] == "float32"
    assert "expected scalar type Float" in manifest.trial["dropped"]["bfloat16"]
    with pytest.raises(RecipeError, match="cannot be computed in bfloat16: RuntimeError: expected scalar type Float"):
        cache_teacher(CacheConfig(precision="bfloat16"), tmp_path / "half.zarr", own, [], context)


def test_a_store_of_another_precision_is_another_store(run):
    teacher, context = setup_of(run)
    with pytest.raises(
        FingerprintMismatch, match="compute.precision: stored 'float32', wanted 'bfloat16'.*out to cont"
    ):
        cache_teacher(FAST, run / "store.zarr", teacher, LAYERS, context)
    exact = dataclasses.replace(CACHE, precision="float32", memory_format="contiguous")
    assert cache_teacher(exact, run / "store.zarr", teacher, LAYERS, context)["num_units_computed"] == 0
    assert not {"compute", "trial"} & read_store_manifest(run / "store.zarr").to_json().keys()


@needs_cpu("it loses its bfloat16")
def test_a_device_without_the_precision_does_not_continue(run, tmp_path, monkeypatch):
    teacher, context = setup_of(run)
    cache_teacher(FAST, tmp_path / "store.zarr", teacher, [], context)
    manifest, said = read_store_manifest(tmp_path / "store.zarr"), []
    begun = dataclasses.replace(manifest, trial={**manifest.trial, "device": "cuda"})
    choice.teacher_of_store(teacher, tmp_path, begun, context.device, said.append)
    assert "was begun on cuda and continues on cpu" in said[0]
    monkeypatch.setattr(settings, "has_bfloat16", lambda: False)
    with pytest.raises(RunError, match="was begun in bfloat16, and this cpu computes float32 in hardware"):
        cache_teacher(CACHE, tmp_path / "store.zarr", teacher, LAYERS, context)
    assert not recompute(tmp_path / "store.zarr", teacher, context, 20, 0).differing  # in float32


def test_batch_size_is_doubled_while_that_pays(run, monkeypatch):
    teacher, context = setup_of(run)

    def seconds(runs, device, **_):
        return {size: size / {16: 1, 32: 1.2, 64: 1.5, 128: 1.52}[size] for size in runs}

    monkeypatch.setattr(trial, "time_in_turn", seconds)
    with trial.ExitStack() as hooks:
        found = trial.Trial(CACHE, teacher, LAYERS, context, 10**6, hooks)
        assert found.batch_size(ComputeSettings(), unit_rows=1000, num_threads=2) == 64
        assert found.batch_size(ComputeSettings(), unit_rows=40, num_threads=2) == 32
        monkeypatch.setattr(trial.Trial, "_free_bytes", lambda self: 20 * self._image_bytes())
        assert found.batch_size(ComputeSettings(), unit_rows=1000, num_threads=2) == 16


def test_a_trial_that_does_not_fit_takes_fewer_images(run, monkeypatch):
    teacher, context = setup_of(run)
    sizes, forward = [], trial.forward

    def limited(extractor, bundle, images, hard):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(extractor, bundle, images, hard)

    monkeypatch.setattr(trial, "forward", limited)
    with trial.ExitStack() as hooks:
        found = trial.Trial(FAST, teacher, LAYERS, context, 100, hooks)
        assert found.faithful(found.candidates)[1]["num_images"] == 16
    assert max(sizes) == 4 and sizes[-1] == 2


def test_gradients_of_pixels_are_not_computed_in_float16(run, monkeypatch):
    teacher, context = setup_of(run)
    monkeypatch.setattr(trial, "fast_precisions", lambda device: ("float16", "bfloat16"))
    for layers, expected in (([], {"float32", "float16", "bfloat16"}), ([INPUT_GRADIENT], {"float32", "bfloat16"})):
        specs = [FeatureSpec(layer, layer) for layer in layers]
        found = trial.Trial(CACHE, teacher, specs, context, 100, trial.ExitStack())
        assert {one.precision for one in found.candidates} == expected


def test_order_of_preference_is_by_exactness(run):
    teacher, context = setup_of(run)
    candidates = trial.Trial(CACHE, teacher, [], context, 100, trial.ExitStack()).candidates
    assert candidates[0] == ComputeSettings() and candidates[-1].precision == "bfloat16"
    assert choose(dict.fromkeys(candidates, 1.0)) == ComputeSettings()


@needs_cpu("its threads compute")
@pytest.mark.usefixtures("always_a_trial")
def test_a_large_job_uses_one_thread_or_all_for_the_same_bits(run, tmp_path, monkeypatch):
    before, used = torch.get_num_threads(), []
    for module in (threads, cache):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    monkeypatch.setattr(threads, "time_in_turn", later_is_faster)
    monkeypatch.setattr(inference, "forward", lambda *given: used.append(torch.get_num_threads()) or forward(*given))
    teacher, context = setup_of(run)
    try:
        for count in (1, None):
            threads.set_up_threads(count)
            cache_teacher(FAST, tmp_path / f"{count}.zarr", teacher, LAYERS, context)
    finally:
        threads.set_up_threads(before)
    one, free = (open_store(tmp_path / f"{count}.zarr") for count in (1, None))
    assert set(used[: len(used) // 2 - 1]) == {1} and set(used) == {1, 2}
    assert "threads" not in one.manifest.trial and free.manifest.trial["threads"] == 2
    for name in ("logits", "features/stage2"):
        assert np.array_equal(one.read_view(name, 1), free.read_view(name, 1))
