"""Tests of exported students: complete artifacts with a card, and which are written again."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.made_store import folder_bytes
from support.tiny_compression import CONFIG, compressed, exported, with_prune
from support.tiny_run import STUDENT, tiny_context

from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.artifacts.model_card import card_text
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.errors import ModelError, RunError
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store import FingerprintMismatch
from kdpipe.store.fs.checksums import SUMS, remove_with_sum, write_with_sum


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
    other = dataclasses.replace(CONFIG, opset=20, steps=("prune",))
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


def test_untrusted_class_names_are_escaped_on_the_card(made):
    card = json.loads((made / "compressed" / "artifacts-seed0" / "int8" / "card.json").read_text())
    text = card_text(card | {"class_names": ["<script>alert(1)</script>", "a\nb", "```", "[x](http://y)", "\u202ezy"]})
    assert "<script>" not in text and "\u202e" not in text and "a?b" in text
    assert text.count("```") == 4 and "[x](" not in text
