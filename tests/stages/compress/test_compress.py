"""Tests of pruning and quantizing students step by step: resuming bit for bit."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from support.made_store import folder_bytes
from support.tiny_compression import CONFIG, compressed, copied, exported, sizes, weights, with_prune
from support.tiny_run import STUDENT, StopAfter, tiny_context

from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import compress, compressed_root
from kdpipe.stages.compress.fine_tune import FineTuneContext, build_fine_tuning
from kdpipe.stages.compress.prune_student import latency_share
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import RunError, StoppedEarly
from kdpipe.stages.export.onnx_session import float_nodes
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.weights.state_dict import count_parameters
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store import FingerprintMismatch


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


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 2, "epochs_per_step": 1, "importance": "taylor"},
        {"budget": "parameters", "importance": "l2", "scope": "global"},
        {"budget": "latency", "ratio": 0.2},
        {"kind": "weights", "ratio": 0.7, "steps": 2, "epochs_per_step": 1},
        {"kind": "blocks+channels", "budget": "macs", "steps": 2, "epochs_per_step": 1},
        {"kind": "low-rank", "budget": "macs", "steps": 2, "epochs_per_step": 1},
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
    until_stop = 40 if changes.get("kind") == "low-rank" else 11  # the choice of ranks begins again
    for _ in range(100):
        try:
            compressed(copy, run, config, monitor=RunMonitor(should_stop=StopAfter(until_stop)))
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


def test_baselines_omit_the_stores_or_pruning(run, copy, without_onnx):
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


def test_blocks_go_by_the_stored_logits_and_are_rebuilt(run, copy):
    config = dataclasses.replace(with_prune(kind="blocks", budget="blocks"), baselines=True, steps=("prune",))
    figures = compressed(copy, run, config)
    student = read_json_file(copy / "students" / "distilled-seed0" / "result.json")
    (first, harm), rest = figures["pruned"]["removed_blocks"][0], figures["pruned"]["removed_blocks"][1:]
    assert not rest and first in ("stage1.3", "stage2.3") and harm > 0 and figures["pruned"]["channel_ratio"] == 0.5
    assert figures["pruned"]["num_macs"] < student["num_macs"]
    assert figures["pruned-alone"]["removed_blocks"][0][1] != harm  # ranked by its labels
    folder = exported(copy, run, dataclasses.replace(config, baselines=False))
    rebuilt = rebuild(folder / "pruned" / "model.safetensors")
    block = [f"{first[:-1]}{number}" for number in (3, 4, 5)]
    assert rebuilt.architecture["removed_blocks"] == block and "widths" not in rebuilt.architecture
    assert f"Removed blocks: {', '.join(block)}" in (folder / "pruned" / "README.md").read_text().replace("\\", "")


def test_layers_are_factored_by_the_stored_logits_and_rebuilt(run, copy):
    config = dataclasses.replace(with_prune(kind="low-rank", budget="parameters", ratio=0.4), baselines=True)
    figures = compressed(copy, run, dataclasses.replace(config, steps=("prune",)))
    student = read_json_file(copy / "students" / "distilled-seed0" / "result.json")
    steps, share = figures["pruned"]["lowered_ranks"], 1 - figures["pruned"]["channel_ratio"]
    assert {path for path, _, _ in steps} <= {"stage1.0", "stage1.3", "stage2.0", "stage2.3"}
    assert figures["pruned"]["num_parameters"] <= 0.6 * student["num_parameters"]
    assert share == pytest.approx(figures["pruned"]["num_parameters"] / student["num_parameters"])
    assert figures["pruned-alone"]["lowered_ranks"][0][2] != steps[0][2]  # chosen by its labels
    assert figures["pruned-alone"]["num_parameters"] <= figures["pruned"]["num_parameters"]

    config = dataclasses.replace(config, baselines=False)
    assert compressed(copy, run, config)["int8"]["accuracy"] > 0.3
    assert "adapters of" not in str(figures)
    folder = exported(copy, run, config)  # which compares ONNX files with torch
    ranks = {path: rank for path, rank, _ in steps}
    for kind in ("pruned", "int8"):
        rebuilt = rebuild(folder / kind / "model.safetensors")
        assert rebuilt.architecture["ranks"] == ranks and "widths" not in rebuilt.architecture
    assert float_nodes(folder / "int8" / "model.onnx") == []
    card = (folder / "pruned" / "README.md").read_text().replace("\\", "")
    assert f"Layers in two, of a low rank: stage1.3 ({ranks['stage1.3']})" in card


def test_missing_earlier_step_is_named(run, copy):
    with pytest.raises(RunError, match="run `kdpipe compress --only prune` first"):
        compressed(copy, run, only=("quantize",))
    compressed(copy, run, only=("prune",))
    with pytest.raises(RunError, match="run `kdpipe compress --only quantize` first"):
        exported(copy, run)


def test_step_beyond_its_goal_leaves_nothing_for_the_next(run, copy, monkeypatch):
    monkeypatch.setattr(FineTuneContext, "exports_onnx", False)
    config = with_prune(budget="macs", ratio=0.2, round_to=4, steps=2, epochs_per_step=1)
    figures = compressed(copy, run, dataclasses.replace(config, baselines=True, steps=("prune",)))
    assert figures["pruned"]["channel_ratio"] > 0
    assert sizes(weights(copy, "pruned")) == sizes(weights(copy, "pruned-alone"))


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
