"""Tests of pruning, quantizing and exporting students: resuming bit for bit, and complete artifacts."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.made_store import folder_bytes
from support.tiny_run import STUDENT, TRAIN, StopAfter, make_tiny_store, open_tiny_spec, tiny_context

from kdpipe.pipeline.steps import train_student
from kdpipe.stages.compress.artifacts.export_student import export_student
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.artifacts.model_card import card_text
from kdpipe.stages.compress.artifacts.write import artifact_folder
from kdpipe.stages.compress.compress import CompressConfig, compress, compressed_root
from kdpipe.stages.compress.fine_tune import FineTuneContext, build_fine_tuning
from kdpipe.stages.compress.prune_student import latency_share
from kdpipe.stages.compress.pruning.prune import PruneConfig
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import ModelError, RunError, StoppedEarly
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.models.weights.state_dict import count_parameters
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store import FingerprintMismatch
from kdpipe.store.fs.checksums import SUMS, remove_with_sum, write_with_sum

FINE = dataclasses.replace(TRAIN, lr=0.01)
CONFIG = CompressConfig(
    niceness=0,
    baselines=False,
    prune=PruneConfig(ratio=0.5, round_to=1),
    prune_train=FINE,
    quantize=QuantizeConfig(calibration_batches=2),
    quantize_train=dataclasses.replace(TRAIN, lr=0.001),
    latency_batch_sizes=(1, 3),
    latency_rounds=3,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Create a run folder with a teacher, its store, and a distilled student."""
    folder = tmp_path_factory.mktemp("compress")
    context = tiny_context(folder)
    make_tiny_store(context)
    train_student(STUDENT, 0, open_tiny_spec(folder / "store.zarr", context), context)
    return folder


def copied(run, folder):
    """Copy the run into another folder; the store stays where it is."""
    for part in ("teacher", "students", "compressed"):
        if (run / part).exists():
            shutil.copytree(run / part, folder / part)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return copied(run, tmp_path)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """Create a run with a student pruned, quantized and exported; read-only."""
    folder = copied(run, tmp_path_factory.mktemp("made"))
    compressed(folder, run)
    exported(folder, run)
    return folder


@pytest.fixture
def own(made, tmp_path):
    """Return a copy of `made`."""
    return copied(made, tmp_path)


def fine_tuning(run, context, config=CONFIG):
    """Return what the fine-tunings of the tiny student share."""
    spec = open_tiny_spec(run / "store.zarr", context)
    return build_fine_tuning(STUDENT, 0, spec, context, compressed_root(context.run_dir, config))


def compressed(copy, run, config=CONFIG, *, monitor=None, only=("prune", "quantize")):
    context = tiny_context(copy, monitor)
    return compress(config, fine_tuning(run, context, config), only=only)


def exported(copy, run, config=CONFIG):
    context = tiny_context(copy)
    export_student(config, fine_tuning(run, context, config), name="tiny")
    return artifact_folder(compressed_root(copy, config), 0)


def with_prune(**changes):
    return dataclasses.replace(CONFIG, prune=dataclasses.replace(CONFIG.prune, **changes))


def weights(copy, kind):
    return load_tensors(copy / "compressed" / f"{kind}-seed0" / "model.safetensors")[0]


def noisy_share(full, measured):
    """Return a latency measure that follows the parameters, with noise."""
    return lambda network: count_parameters(network) / count_parameters(full) * (1 + 0.05 * (next(measured) % 7))


def hint_losses(folder):
    return [json.loads(line)["losses"]["hint_1"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fine_tuning_continues_with_the_hints_adapter(made):
    student, pruned, int8 = (
        hint_losses(made / folder)
        for folder in ("students/distilled-seed0", "compressed/pruned-seed0", "compressed/int8-seed0")
    )
    assert pruned[0] < 1.05 * student[-1] < student[0]  # from random it is above the student's first
    assert int8[0] < 1.05 * pruned[-1]


def test_latency_share_of_a_network_with_itself(run):
    full = build_student(STUDENT, 0, tiny_context(run)).model
    assert 0.2 < latency_share(full, (1, 8, 8))(full) < 5


def sizes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 2, "epochs_per_step": 1, "importance": "taylor"},
        {"budget": "parameters", "importance": "l2", "scope": "global"},
        {"budget": "latency", "ratio": 0.2},
        {"kind": "weights", "ratio": 0.7, "steps": 2, "epochs_per_step": 1},
    ],
    ids=lambda settings: settings.get("kind") or settings.get("budget") or settings["importance"],
)
def test_repeatedly_stopped_equals_uninterrupted(run, copy, tmp_path_factory, monkeypatch, changes):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)  # without ONNX files, which take most of the time
    measured = itertools.count()
    monkeypatch.setattr(
        "kdpipe.stages.compress.prune_student.latency_share", lambda full, shape: noisy_share(full, measured)
    )
    config, other = with_prune(**changes), copied(run, tmp_path_factory.mktemp("undisturbed"))
    for _ in range(100):
        try:
            compressed(copy, run, config, monitor=RunMonitor(should_stop=StopAfter(11)))
            break
        except StoppedEarly:
            pass
    else:
        pytest.fail("it never came to its end")
    if changes.get("budget") == "latency":  # a second measurement would differ, so the first is saved
        recorded = read_json_file(copy / "compressed" / "pruned-seed0" / "result.json")["channel_ratio"]
        config = with_prune(ratio=recorded)
        compressed(other, run, config, only=("prune",))
        assert sizes(weights(copy, "pruned")) == sizes(weights(other, "pruned"))
        return
    compressed(other, run, config)
    for kind in ("pruned", "int8"):
        first, second = weights(copy, kind), weights(other, kind)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(copy.rglob("start.safetensors")) and not list(copy.rglob("checkpoint.safetensors"))


def test_finished_job_is_untouched_and_other_recipe_refused(run, own):
    before = folder_bytes(own)
    assert compressed(own, run).keys() == {"pruned", "int8"}
    exported(own, run)
    assert folder_bytes(own) == before
    with pytest.raises(FingerprintMismatch, match="prune.importance: stored 'l1', wanted 'l2'"):
        compressed(own, run, with_prune(importance="l2"))


def test_figures_describe_the_pruning(made):
    figures = read_json_file(made / "compressed" / "pruned-seed0" / "result.json")
    student = read_json_file(made / "students" / "distilled-seed0" / "result.json")
    assert figures["num_parameters"] < 0.6 * student["num_parameters"]
    assert figures["num_macs"] < 0.6 * student["num_macs"]
    assert figures["channel_ratio"] == 0.5
    assert figures["excluded"] == {"fc": "it writes the logits"}
    assert 0 <= figures["accuracy_before"] <= 1


def test_baselines_omit_the_stores_or_pruning(run, copy):
    config = dataclasses.replace(CONFIG, baselines=True)
    figures = compressed(copy, run, config)
    kinds = {"pruned", "pruned-alone", "int8", "int8-alone", "int8-ptq", "int8-unpruned", "int8-unpruned-alone"}
    assert figures.keys() == kinds
    root = copy / "compressed"
    for kind in kinds:
        distillation = read_json_file(root / f"{kind}-seed0" / "job.json")["distillation"]
        assert (distillation is None) == (kind.endswith("-alone") or kind == "int8-ptq")
        # What is there to be compared with is not for use.
        assert (root / f"{kind}-seed0" / "model.onnx").exists() == (distillation is not None)
    starts = {
        kind: read_json_file(root / f"{kind}-seed0" / "job.json")["starts_from"]["weights_sha256"] for kind in kinds
    }
    identities = {kind: figures[kind]["identity"]["weights_sha256"] for kind in kinds}
    assert starts["int8-alone"] == identities["pruned-alone"] != starts["int8"] == identities["pruned"]
    assert starts["int8-ptq"] == starts["int8-unpruned"] == starts["pruned"] == starts["pruned-alone"]
    assert figures["int8-ptq"]["num_epochs"] == 0
    assert len(set(identities.values())) == len(kinds)


AVERAGED = {"optimizer": "adam", "betas": (0.8, 0.9), "ema_decay": 0.9, "clip_grad": 1.0}


@pytest.mark.parametrize(("kind", "train"), [("weights", {}), ("2:4", {}), ("weights", AVERAGED)])
def test_zeros_survive_both_fine_tunings(run, copy, monkeypatch, kind, train):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    config = with_prune(kind=kind)
    trainings = ("prune_train", "quantize_train")
    changed = {key: dataclasses.replace(getattr(config, key), **train) for key in trainings}
    compressed(copy, run, dataclasses.replace(config, **changed))
    for network in ("pruned", "int8"):
        state = weights(copy, network)
        weight = state["stage2.0.weight"]
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
        if kind == "2:4":
            fours = weight.movedim(1, -1).reshape(-1, 4)
            assert int((fours != 0).sum(1).max()) == 2
        assert not (state["fc.weight"] == 0).any()


def test_hard_label_baseline_uses_its_own_gradients(run, copy, monkeypatch):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    config = dataclasses.replace(with_prune(importance="taylor"), baselines=True, steps=("prune",))
    compressed(copy, run, config)
    assert sizes(weights(copy, "pruned")) == sizes(weights(copy, "pruned-alone"))


def test_missing_earlier_step_is_named(run, copy):
    with pytest.raises(RunError, match="run `kdpipe compress --only prune` first"):
        compressed(copy, run, only=("quantize",))
    compressed(copy, run, only=("prune",))
    with pytest.raises(RunError, match="run `kdpipe compress --only quantize` first"):
        exported(copy, run)


def answers(path, images):
    return onnxruntime.InferenceSession(path).run(["logits"], {"images": images.numpy()})[0]


def test_artifacts_run_and_rebuild_from_their_record(made):
    folder = made / "compressed" / "artifacts-seed0"
    assert {path.name for path in folder.iterdir()} == {"student", "pruned", "int8", "card.json", "README.md", SUMS}
    names = {"model.onnx", "model.pt2", "model.safetensors", "predict.py", "card.json", "README.md", SUMS}
    assert {path.name for path in (folder / "int8").iterdir()} == names
    test = tiny_context(made).test_set
    rebuilt = rebuild(folder / "int8" / "model.safetensors")
    images = rebuilt.normalize(test.images)
    with torch.no_grad():
        expected = rebuilt.model(images)
    assert rebuilt.architecture["widths"] and rebuilt.architecture["quantized"] == "int8"
    for batch in (images, images[:1]):
        found = answers(folder / "int8" / "model.onnx", batch)
        assert (found.argmax(1) == expected[: len(batch)].argmax(1).numpy()).mean() >= 0.98
        program = torch.export.load(folder / "int8" / "model.pt2").module()
        assert (program(batch).argmax(1) == expected[: len(batch)].argmax(1)).float().mean() >= 0.98
        plain = torch.export.load(folder / "pruned" / "model.pt2").module()(batch)
        np.testing.assert_allclose(
            answers(folder / "pruned" / "model.onnx", batch), plain.detach().numpy(), rtol=1e-3, atol=1e-4
        )


def test_card_states_origin_and_how_to_run(run, made):
    folder = made / "compressed" / "artifacts-seed0" / "int8"
    card, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    teacher = read_json_file(run / "teacher" / "result.json")["identity"]["weights_sha256"]
    assert card["teachers"][0]["weights_sha256"] == teacher and teacher[:12] in text
    assert list(card["networks"]) == ["teacher", "student", "pruned", "int8"]
    assert card["class_names"] == list("abcd") and card["input"]["shape"] == ["batch", 1, 8, 8]
    assert card["latency"]["files"]["int8"]["3"]["p95_ms"] >= card["latency"]["files"]["int8"]["3"]["p50_ms"] > 0
    assert card["networks"]["int8"]["float_nodes"] == []
    code = text.split("```python\n")[1].split("```")[0]
    assert "from predict import load_image, predict" in code


def test_artifacts_rank_every_network(made):
    folder = made / "compressed" / "artifacts-seed0"
    card, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    assert sorted(card["ranking"]) == ["int8", "pruned", "student"]
    assert f"Recommended: [{card['ranking'][0]}]" in text and card["reason"] in text
    for kind in card["ranking"]:
        own = json.loads((folder / kind / "card.json").read_text())
        weights = read_json_file(own_result(made, kind))["identity"]["weights_sha256"]
        assert own["network"] == kind and own["networks"][kind]["weights_sha256"] == weights


def own_result(run, kind):
    folder = run / ("students/distilled-seed0" if kind == "student" else f"compressed/{kind}-seed0")
    return folder / "result.json"


def test_artifacts_are_rewritten_only_for_other_settings(run, own):
    folder = own / "compressed" / "artifacts-seed0"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    exported(own, run)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    other = dataclasses.replace(CONFIG, opset=20)
    exported(own, run, other)
    found = onnx.load(folder / "pruned" / "model.onnx").opset_import
    assert [opset.version for opset in found if opset.domain == ""] == [20]


def test_earlier_artifacts_survive_a_failed_export(run, own, monkeypatch):
    folder = own / "compressed" / "artifacts-seed0"
    before = folder_bytes(folder)
    with pytest.raises(ModelError, match="opset"):
        exported(own, run, dataclasses.replace(CONFIG, opset=7))
    monkeypatch.setattr("kdpipe.stages.training.finalize.min_agreement", lambda num_images: 1.1)
    monkeypatch.setattr(
        "kdpipe.stages.training.finalize.CHECKED_IMAGES", 5
    )  # of a step's own file; what is handed over sees all 80
    with pytest.raises(ModelError, match=r"agrees with torch on .* % of 80 test images, wanted 110 %"):
        exported(own, run, dataclasses.replace(CONFIG, opset=20))
    assert folder_bytes(folder) == before
    assert not list(own.rglob("*.partial"))


def test_unwritable_folder_is_an_error(run, own):
    shutil.rmtree(own / "compressed" / "artifacts-seed0")
    (own / "compressed" / "artifacts-seed0").write_text("in the way")
    with pytest.raises(RunError, match="artifacts folder .* cannot be created"):
        exported(own, run)


def test_external_student_is_compressed_in_its_own_folder(run, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    state = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")[0]
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "external.pt")
    config = dataclasses.replace(CONFIG, student=str(tmp_path / "external.pt"))
    figures = compressed(copy, run, config)
    assert compressed_root(copy, config).name == "compressed-external"
    given = read_json_file(copy / "compressed-external" / "given" / "result.json")
    assert given["accuracy"] == read_json_file(run / "students" / "distilled-seed0" / "result.json")["accuracy"]
    assert figures["int8"] == compressed(copy, run, config)["int8"]


def test_bf16_student_passes_through_unchanged(run, copy, tmp_path):
    state = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")[0]
    bf16 = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(bf16, tmp_path / "narrow.pt")
    config = dataclasses.replace(CONFIG, student=str(tmp_path / "narrow.pt"), steps=())
    assert compressed(copy, run, config) == {}
    stored = load_tensors(exported(copy, run, config) / "student" / "model.safetensors")[0]
    assert stored.keys() == bf16.keys()
    assert all(stored[name].dtype == bf16[name].dtype and torch.equal(stored[name], bf16[name]) for name in bf16)


def test_pruned_external_student_is_pruned_further(run, own):
    student_file = exported(own, run, dataclasses.replace(CONFIG, steps=("prune",))) / "pruned" / "model.safetensors"
    config = dataclasses.replace(CONFIG, student=str(student_file), steps=("prune",))
    again = compressed(own, run, config)["pruned"]
    assert (
        again["num_parameters"] < read_json_file(own / "compressed" / "pruned-seed0" / "result.json")["num_parameters"]
    )


def test_files_of_other_networks_are_refused(run, made, copy, tmp_path):
    quantized = made / "compressed" / "artifacts-seed0" / "int8" / "model.safetensors"
    for path, kind, sentence in (
        (quantized, ModelError, "is already quantized"),
        (tmp_path / "absent.pt", ModelError, "there is no weights file"),
        (run / "teacher" / "model.safetensors", FingerprintMismatch, "args.width: stored 8, wanted 4"),
    ):
        with pytest.raises(kind, match=sentence):
            compressed(copy, run, dataclasses.replace(CONFIG, student=str(path)))
    tensors, record = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")
    save_tensors(tmp_path / "other.safetensors", tensors, record | {"class_names": ["x", "y", "z", "u"]})
    with pytest.raises(FingerprintMismatch, match="class_names"):
        compressed(copy, run, dataclasses.replace(CONFIG, student=str(tmp_path / "other.safetensors")))


def test_python_model_needs_trust_python(tmp_path):
    architecture = {"model": "python:os:system", "args": {}, "num_classes": 2, "in_channels": 1, "image_size": [8, 8]}
    record = {"architecture": architecture, "normalization": {"mean": [0.0], "std": [1.0]}}
    save_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(1)}, record)
    with pytest.raises(ModelError, match="pass trust_python=True"):
        rebuild(tmp_path / "model.safetensors")


def test_int4_rounds_only_linear_layers(run, copy):
    student = dataclasses.replace(STUDENT, model=ModelConfig(name="cnn", args={"width": 4, "num_stages": 2}))
    assert student == STUDENT
    config = dataclasses.replace(CONFIG, steps=("quantize",), quantize=QuantizeConfig(scheme="int4", block_size=16))
    figures = compressed(copy, run, config)
    assert figures.keys() == {"int4"}
    rebuilt = rebuild(exported(copy, run, config) / "int4" / "model.safetensors")
    assert rebuilt.architecture["quantized"] == "int4"


def test_excluded_layers_are_float_and_on_the_card(run, copy):
    quantize = dataclasses.replace(CONFIG.quantize, exclude=("stage1.0",))
    config = dataclasses.replace(CONFIG, steps=("quantize",), quantize=quantize)
    compressed(copy, run, config)
    card = json.loads((exported(copy, run, config) / "int8" / "card.json").read_text())
    assert card["architecture"]["exclude"] == ["stage1.0"]
    assert any("stage1" in node for node in card["networks"]["int8"]["float_nodes"])


def test_step_beyond_its_goal_leaves_nothing_for_the_next(run, copy, monkeypatch):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    config = with_prune(budget="macs", ratio=0.2, round_to=4, steps=2, epochs_per_step=1)
    figures = compressed(copy, run, dataclasses.replace(config, baselines=True, steps=("prune",)))
    assert figures["pruned"]["channel_ratio"] > 0
    assert sizes(weights(copy, "pruned")) == sizes(weights(copy, "pruned-alone"))


def test_only_agreeing_files_are_exported(run, own):
    folder = own / "compressed" / "artifacts-seed0"
    shutil.rmtree(folder)
    pruned = own / "compressed" / "pruned-seed0" / "model.onnx"
    write_with_sum(pruned, (run / "teacher" / "model.onnx").read_bytes())
    with pytest.raises(ModelError, match=r"agrees with torch on .* test images"):
        exported(own, run)
    assert not list((folder / "pruned").iterdir())
    remove_with_sum(pruned)
    with pytest.raises(RunError, match="is missing: delete the folder"):
        exported(own, run)


@pytest.mark.parametrize("damage", ["model.onnx", "model.safetensors", "predict.py", "card.json"])
def test_damaged_artifacts_are_rewritten(run, own, damage):
    folder = own / "compressed" / "artifacts-seed0"
    before = folder_bytes(folder)
    (folder / "int8" / damage).write_text('{"files": [1]}')
    exported(own, run)
    assert folder_bytes(folder) == before


def test_stale_artifacts_are_removed(run, own):
    folder = exported(own, run, dataclasses.replace(CONFIG, steps=("prune",)))
    assert {path.name for path in folder.iterdir()} == {"student", "pruned", "card.json", "README.md", SUMS}


def test_quantized_student_of_another_network_is_refused(run, own):
    with pytest.raises(FingerprintMismatch, match="starts_from"):
        exported(own, run, dataclasses.replace(CONFIG, steps=("quantize",)))


def test_student_pruned_with_other_settings_is_refused(run, own):
    with pytest.raises(FingerprintMismatch, match="prune.ratio: stored 0.5, wanted 0.25"):
        exported(own, run, with_prune(ratio=0.25))
    with pytest.raises(FingerprintMismatch, match="prune.ratio: stored 0.5, wanted 0.25"):
        compressed(own, run, with_prune(ratio=0.25), only=("quantize",))


def test_another_student_is_refused_first(run, own):
    other = dataclasses.replace(STUDENT, model=ModelConfig(name="cnn", args={"width": 3, "num_stages": 2}))
    context = tiny_context(own)
    spec = open_distillation([run / "store.zarr"], (), other, {}, context)
    with pytest.raises(FingerprintMismatch, match="args.width: stored 4, wanted 3"):
        compress(
            CONFIG,
            build_fine_tuning(other, 0, spec, context, compressed_root(context.run_dir, CONFIG)),
            only=("prune",),
        )


def test_leftovers_of_killed_writers_are_removed(run, own):
    leftover = own / "compressed" / "pruned-seed0" / ".checkpoint.safetensors.0123abcd.partial"
    leftover.write_bytes(b"half")
    (own / "compressed" / "pruned-seed0" / "start.safetensors").write_bytes(b"left")
    compressed(own, run)
    assert not leftover.exists() and not list(own.rglob("start.safetensors"))


def test_pruned_checkpoint_of_another_job_is_an_error(run, copy):
    folder = copy / "compressed" / "pruned-seed0"
    folder.mkdir(parents=True)
    shutil.copy(run / "teacher" / "model.safetensors", folder / "start.safetensors")
    with pytest.raises(RunError, match="start.safetensors does not fit this job"):
        compressed(copy, run)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1j])
def test_non_finite_weights_are_refused(run, copy, tmp_path, value):
    state = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")[0]
    state["fc.bias"] = state["fc.bias"] * value
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ModelError, match=r"fc\.bias (holds NaN or infinity|is stored as complex64)"):
        exported(copy, run, dataclasses.replace(CONFIG, student=str(tmp_path / "broken.pt"), steps=()))


@pytest.mark.parametrize("architecture", ["x", [1, 2], None, 5, {"widths": "x"}])
def test_invalid_headers_are_refused(run, copy, tmp_path, architecture):
    tensors, record = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")
    own = record["architecture"] | architecture if isinstance(architecture, dict) else architecture
    save_tensors(tmp_path / "odd.safetensors", tensors, record | {"architecture": own})
    with pytest.raises(ModelError, match="has no valid architecture"):
        compressed(copy, run, dataclasses.replace(CONFIG, student=str(tmp_path / "odd.safetensors")))


@pytest.mark.parametrize(
    "change",
    [
        {"args": {"width": 10**12}},
        {"num_classes": 10**13},
        {"num_classes": -1},
        {"image_size": [10**6, 10**6]},
        {"quantized": "int3"},
        {"quantized": "int8", "exclude": "fc"},
        {"widths": [1]},
    ],
    ids=str,
)
def test_hostile_records_are_not_built(run, tmp_path, change):
    tensors, record = load_tensors(run / "students" / "distilled-seed0" / "model.safetensors")
    record["architecture"] |= change
    save_tensors(tmp_path / "hostile.safetensors", tensors, record)
    with pytest.raises(ModelError) as raised:
        rebuild(tmp_path / "hostile.safetensors")
    assert "\n" not in str(raised.value)


def test_untrusted_class_names_are_escaped_on_the_card(made):
    card = json.loads((made / "compressed" / "artifacts-seed0" / "int8" / "card.json").read_text())
    text = card_text(card | {"class_names": ["<script>alert(1)</script>", "a\nb", "```", "[x](http://y)", "\u202ezy"]})
    assert "<script>" not in text and "\u202e" not in text and "a?b" in text
    assert text.count("```") == 4 and "[x](" not in text
