"""Features that are no module's output: the classifier's input, class activation maps, parts of a ViT's tokens.

`pre_logits` is what goes into the last layer of any network, or what a network without a classifier returns.
`layer4.cam` are the class activation maps of a module's maps: the classifier's weights at each position.
`blocks.9.class_token`, `blocks.9.patch_mean` and `blocks.9.patch_map` are parts of the tokens that a module outputs;
`blocks.9.attn.attention` is the attention of each head of timm's networks. All are features like the output of a
module, for every loss and store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError

CLASS_TOKEN, PATCH_MEAN, PATCH_MAP, ATTENTION, CAM = "class_token", "patch_mean", "patch_map", "attention", "cam"
FORMS = (CLASS_TOKEN, PATCH_MEAN, PATCH_MAP, ATTENTION, CAM)

PRE_LOGITS = "pre_logits"
"""The embedding of an image: the input of the classifier, or the output of a network without one."""

HEADLESS = "_kdpipe_headless"
"""The attribute of networks that return embeddings [B, D]."""

PREFIX_TOKENS = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens")
"""Names of the parameters [1, n, D] that timm, transformers and torchvision put before the patches."""


def split_form(model: nn.Module, layer: str) -> tuple[str, str | None]:
    """Return the module's path, "" for the network itself, and the form that follows it: None for its whole output."""
    path, _, form = layer.rpartition(".")
    if layer in dict(model.named_modules(remove_duplicate=False)):
        return layer, None
    if layer == PRE_LOGITS:
        return ("", None) if is_headless(model) else (classifier_path(model), PRE_LOGITS)
    return (path, form) if form in FORMS and path else (layer, None)


def is_headless(model: nn.Module) -> bool:
    """Return whether a network returns embeddings in place of logits."""
    return bool(getattr(model, HEADLESS, False))


def classifier_path(model: nn.Module) -> str:
    """Return the path of the last linear layer or convolution. Raises ModelError if there is none."""
    paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not paths:
        raise ModelError(f"{PRE_LOGITS!r} is the input of the last linear layer or convolution, and there is none.")
    return paths[-1]


@contextmanager
def hooked(module: nn.Module, layer: str, form: str | None) -> Iterator[nn.Module]:
    """Give the module whose output has the form: of attention the one behind its softmax, without fused attention."""
    if form != ATTENTION:
        yield module
        return
    inner, fused = getattr(module, "attn_drop", None), getattr(module, "fused_attn", None)
    if not isinstance(inner, nn.Module) or fused is None:
        raise ModelError(f"{layer!r}: {type(module).__name__} is no attention of timm, which ends in `attn`.")
    attention: Any = module
    attention.fused_attn = False
    try:
        yield inner
    finally:
        attention.fused_attn = fused


def token_part(model: nn.Module, layer: str, form: str | None) -> Callable[[Tensor], Tensor]:
    """Return what takes the form from tokens [B, N, D]: [B, D], or for `patch_map` [B, D, H, W]; `cam` from maps.

    Maps [B, H, W, C] of timm's networks of that layout count as patches without others before them.
    """
    if form in (None, ATTENTION):
        return lambda output: output
    if form == PRE_LOGITS:
        return lambda features: features.flatten(1) if features.shape[2:].numel() == 1 else features
    if form == CAM:
        return partial(_class_activation, model.get_submodule(classifier_path(model)), layer)
    before, channels_last = num_prefix_tokens(model), str(getattr(model, "output_fmt", "")).endswith("NHWC")

    def take(tokens: Tensor) -> Tensor:
        if tokens.dim() == 4 and channels_last and form != CLASS_TOKEN:
            return tokens.mean((1, 2)) if form == PATCH_MEAN else tokens.permute(0, 3, 1, 2).contiguous()
        if tokens.dim() != 3 or (form == CLASS_TOKEN and not before):
            found = f"{list(tokens.shape[1:])} per image, {before} of them before the patches"
            wanted = "tokens [N, D] with a class token" if form == CLASS_TOKEN else "tokens [N, D]"
            raise ModelError(f"{layer!r} needs {wanted}, not {found}.")
        patches = tokens[:, before:]
        if form != PATCH_MAP:
            return tokens[:, 0] if form == CLASS_TOKEN else patches.mean(1)
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise ModelError(
                f"{layer!r}: {tokens.shape[1]} tokens less {before} before the patches are no square: choose "
                f"{PATCH_MEAN} or {CLASS_TOKEN}."
            )
        return patches.transpose(1, 2).reshape(len(tokens), -1, side, side)

    return take


def _class_activation(classifier: nn.Module, layer: str, maps: Tensor) -> Tensor:
    """Compute the class activation maps [B, C, H, W] of maps [B, D, H, W], without the classifier's bias.

    Zhou et al. 2016, "Learning Deep Features for Discriminative Localization", CVPR (arXiv 1512.04150).
    """
    weight = classifier.get_parameter("weight").flatten(1)
    if maps.dim() != 4 or maps.shape[1] != weight.shape[1]:
        raise ModelError(
            f"{layer!r} needs maps of the {weight.shape[1]} features that the classifier takes, and these are "
            f"{list(maps.shape[1:])}: choose the last map, whose average goes into one linear layer."
        )
    # A copy, as the backward pass needs the maps, which the network may overwrite in place.
    return F.conv2d(maps.clone(), weight[:, :, None, None].to(maps.dtype))


def num_prefix_tokens(model: nn.Module) -> int:
    """Return the number of tokens before the patches: class, distillation and register tokens."""
    if isinstance(stated := getattr(model, "num_prefix_tokens", None), int):
        return stated
    found = {name.rpartition(".")[2]: value.shape for name, value in model.named_parameters() if value.dim() == 3}
    return sum(shape[1] for name, shape in found.items() if name in PREFIX_TOKENS)
