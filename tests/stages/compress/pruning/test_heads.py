"""ViTs of timm and transformers lose whole attention heads, or keep all of them with a reason."""

import pytest
import torch
from support.tiny_nets import NUM_CLASSES, sgd, step
from torch import nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.build import ModelConfig, build_model

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TIMM = {"depth": 2, "embed_dim": 12, "num_heads": 3, "patch_size": 4}
HF = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 32, "patch_size": 4}
SIGLIP = {"model_type": "siglip", "vision_config": HF}
VITS = [
    ("timm:vit_tiny_patch16_224", TIMM, "blocks.{}.attn", "qkv", "proj"),
    ("hf:none", {"model_type": "deit", **HF}, "deit.layers.{}.attention", "q_proj", "o_proj"),
    ("hf:none", SIGLIP, "vision_model.encoder.layers.{}.self_attn", "v_proj", "out_proj"),
]


def built(name: str, args: object, seed: int = 0) -> nn.Module:
    pytest.importorskip("timm" if name.startswith("timm:") else "transformers")
    config = ModelConfig(name=name, args=args)  # type: ignore[arg-type]
    return build_model(config, num_classes=NUM_CLASSES, in_channels=3, image_size=(8, 8), seed=seed).eval()


@pytest.mark.parametrize(("name", "args", "attention", "_", "__"), VITS)
def test_heads_stay_unless_asked_and_the_embedding_gets_narrower(name, args, attention, _, __):
    pruned = prune(built(name, args), IMAGES, PruneConfig(round_to=1))
    places = tuple(attention.format(block) for block in (0, 1))
    kept = [path for path, why in pruned.excluded.items() if why.endswith(f"{places[0]!r}, whose heads stay")]
    assert kept
    assert all(path.startswith(places[0]) for path in kept)
    assert not any(path.startswith(places) and path.endswith(("qkv", "q_proj", "k_proj")) for path in pruned.removed)
    before, after = (record_widths(network) for network in (built(name, args), pruned.model))
    embeddings = [path for path in after if after[path] == {"channels": 6} and before[path] == {"channels": 12}]
    assert bool(embeddings) == (args is not SIGLIP)  # whose pooling, which the logits do not use, reads it as well
    again = apply_widths(built(name, args, seed=1), after)
    again.load_state_dict(pruned.model.state_dict())
    assert torch.equal(again(IMAGES), pruned.model.eval()(IMAGES))
    step(pruned.model, sgd(pruned.model), seed=1)


@pytest.mark.parametrize(("name", "args", "attention", "projection", "reader"), VITS)
def test_heads_are_removed_whole_and_the_others_compute_the_same(name, args, attention, projection, reader):
    model = built(name, args)
    places = [attention.format(block) for block in (0, 1)]
    others = tuple(path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and "mlp" in path)
    pruned = prune(model, IMAGES, PruneConfig(ratio=0.4, round_to=1, heads=True, exclude=others))
    with torch.no_grad():
        for place in places:
            lost = [index for index in pruned.removed[f"{place}.{projection}"] if index < 12]
            assert len(lost) == 4
            assert lost[0] % 4 == 0
            model.get_submodule(f"{place}.{reader}").weight[:, lost] = 0
        torch.testing.assert_close(pruned.model.eval()(IMAGES), model(IMAGES))
    again = apply_widths(built(name, args, seed=1), record_widths(pruned.model))
    again.load_state_dict(pruned.model.state_dict())
    assert torch.equal(again(IMAGES), pruned.model(IMAGES))
    step(pruned.model, sgd(pruned.model), seed=1)


def test_steps_budgets_and_scopes_count_heads():
    model = built(*VITS[0][:2])
    config = PruneConfig(ratio=0.3, round_to=1, heads=True, budget="macs", scope="global")
    half = prune(model, IMAGES, config, done=0.5)
    whole = prune(half.model, IMAGES, config, full=model)
    sizes = [sum(each.numel() for each in network.parameters()) for network in (model, half.model, whole.model)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert prune(model, IMAGES, PruneConfig(ratio=0.9, round_to=1, heads=True)).model.blocks[0].attn.num_heads == 1


REFUSED = [
    ("timm:vit_tiny_patch16_224", {**TIMM, "qk_norm": True}, "'blocks.0.attn': its channels meet those of a LayerNorm"),
    ("timm:vit_relpos_small_patch16_224", TIMM, "its channels meet those of a Linear"),
    ("timm:vit_small_patch16_dinov3", TIMM, "torch-pruning cannot tell its heads apart"),
    ("timm:resnet18", {}, r"\(it has none of timm or transformers\)"),
]


@pytest.mark.parametrize(("name", "args", "reason"), REFUSED)
def test_attentions_that_need_all_heads_are_refused(name, args, reason):
    with pytest.raises(ModelError, match=rf"no attention of this model can lose heads .*{reason}"):
        prune(built(name, args), IMAGES, PruneConfig(round_to=1, heads=True))


def test_heads_need_channels_and_records_whole_heads():
    with pytest.raises(RecipeError, match='heads = true needs kind = "channels"'):
        PruneConfig(kind="weights", heads=True)
    model = built(*VITS[0][:2])
    widths = record_widths(model)
    widths["blocks.1.attn.qkv"]["out_features"] = 30
    with pytest.raises(ModelError, match="not a whole number of heads of 4 channels"):
        apply_widths(model, widths)
