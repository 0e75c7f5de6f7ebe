"""A ViT of timm as teacher of a convolutional student, from the cache to the pruned student, and the way back."""

import json

import pytest
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here

pytest.importorskip("timm")

RECIPE = f"""
name = "vit"
device = "{DEVICE}"
num_threads = 1
data = {{ name = "digits", num_train = 64, channels = 3 }}
views = {{ num_views = 1 }}

[teacher]
export = false

[teacher.model]
name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
args = {{ depth = 2, patch_size = 2, embed_dim = 12 }}

[teacher.train]
epochs = 1
batch_size = 32

[student]
model = {{ name = "cnn", args = {{ width = 4 }} }}
train = {{ epochs = 1, batch_size = 32 }}
seeds = [0]
baseline = false

[compress]
baselines = false
niceness = 0
steps = ["prune"]
prune = {{ round_to = 1 }}
prune_train = {{ epochs = 1, batch_size = 32 }}
"""

LAYERS = {
    **{loss: [["stage2", "blocks.1.patch_map"]] for loss in ("hint", "at", "nst", "vid")},
    "review_kd": [["stage1", "blocks.0.patch_map"], ["stage2", "blocks.1.patch_map"]],
    **{loss: [["stage2", "blocks.1.class_token"]] for loss in ("rkd", "sp", "pkt", "cc")},
    "crd": [["stage2", "blocks.1.patch_mean"]],
}


def test_a_vit_teaches_a_cnn(tmp_path):
    losses = [f"\n[[distill]]\nloss = {loss!r}\nlayers = {layers}" for loss, layers in LAYERS.items()]
    (tmp_path / "vit.toml").write_text(RECIPE + "\n".join(losses))
    ended = kdpipe_here("run", tmp_path / "vit.toml", "--run", tmp_path / "run")
    assert ended.exit_code == 0, ended.stderr
    stored = {folder.name for folder in (tmp_path / "run" / "store.zarr").glob("*/*")}
    assert {"blocks.1.class_token", "blocks.1.patch_mean", "blocks.1.patch_map"} <= stored


def test_a_cnn_teaches_a_vit_and_raw_tokens_are_refused(tmp_path):
    recipe = tmp_path / "back.toml"
    swapped = (
        RECIPE.replace("[teacher]\nexport = false\n\n[teacher.model]", "[student.model]")
        .replace("[teacher.train]", "[student.train]")
        .replace("[student]\nmodel", "[teacher]\nmodel")
        .replace("seeds = [0]\nbaseline = false\n", "export = false\n")
        .replace('steps = ["prune"]', "steps = []")
    )
    recipe.write_text(swapped + '\n[[distill]]\nloss = "at"\nlayers = [["blocks.1.patch_map", "stage2"]]\n')
    ended = kdpipe_here("recipe", "check", recipe)
    assert ended.exit_code == 0, ended.stdout
    recipe.write_text(swapped + '\n[[distill]]\nloss = "at"\nlayers = [["blocks.1", "stage2"]]\n')
    ended = kdpipe_here("recipe", "check", recipe)
    assert ended.exit_code == 2
    assert "or add .patch_map to the layer of a ViT's tokens" in ended.stdout


def test_a_distillation_token_learns_from_the_teacher(tmp_path):
    """DeiT: the class token learns the labels, the distillation token the teacher's class."""
    recipe, run = tmp_path / "deit.toml", tmp_path / "run"
    recipe.write_text(
        RECIPE.replace("[teacher]\nexport = false\n\n[teacher.model]", "[student.model]")
        .replace("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_distilled_patch16_224")
        .replace("[teacher.train]", "[student.train]")
        .replace("[student]\nmodel", "[teacher]\nexport = false\nmodel")
        .replace("[compress]", '[compress]\ntarget = ["onnxruntime"]')
        .replace("seeds = [0]\nbaseline = false\n", "")
        + '\n[student]\nseeds = [0]\nbaseline = false\n\n[[distill]]\nloss = "hard_distillation"\n'
    )
    heads = ["--set", "student.heads.labels=head", "--set", "student.heads.distillation=head_dist"]
    ended = kdpipe_here("plan", recipe, "--run", run, *heads)
    assert ended.exit_code == 0, ended.stderr
    ended = kdpipe_here("run", recipe, "--run", run, *heads, "--set", "compress.prune.importance=taylor")
    assert ended.exit_code == 0, ended.stderr
    assert "classifiers" not in ended.stderr
    folder = run / "students" / "distilled-seed0"
    assert json.loads((folder / "result.json").read_text())["onnx_agreement"] == 1
    ended = kdpipe_here(
        "train-student", recipe, "--run", tmp_path / "other", "--set", f"student.stores=[{str(run / 'store.zarr')!r}]"
    )
    assert "has two classifiers, and both learn the labels and the teacher: student.heads = { labels =" in ended.stderr
    ended = kdpipe_here("cohort", recipe, "--run", run, *heads, "--set", "cohort.members=2")
    assert "student.heads: the members of a cohort learn with their outputs" in ended.stderr
