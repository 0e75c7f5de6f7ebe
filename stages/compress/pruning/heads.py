"""Attention heads of ViTs of timm and transformers, which are removed whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.main_logits import main_logits

LIBRARIES = ("timm", "transformers")
COUNTS = ("num_heads", "num_attention_heads", "num_kv_heads")
WIDTHS = ("attn_dim", "all_head_size", "kv_dim", "embed_dim")
"""Attributes of attentions that are the number of heads, and the channels of all heads."""

PROJECTION = re.compile(r"(to_)?(qkv|kv|qk|q|k|v|query|key|value)(_proj)?")


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of an attention.

    Attributes:
        attention: The module, whose forward divides the channels of its projections by a number of heads it knows.
        projections: Linear layers that make queries, keys and values, with how many of these each makes in a row.
        head_dim: The channels of a head.
    """

    attention: nn.Module
    projections: dict[nn.Module, int]
    head_dim: int

    def fit(self) -> None:
        """Let the attention know how many heads its projections have.

        Raises:
            ModelError: They have parts of a head, or different numbers of heads.
        """
        widths = {layer.out_features / parts for layer, parts in self.projections.items()}  # type: ignore[operator]
        width = int(widths.pop())
        if widths or width % self.head_dim:
            raise ModelError(
                f"the queries, keys and values of an attention are not a whole number of heads of {self.head_dim} "
                "channels each, alike for all three."
            )
        for names, value in ((COUNTS, width // self.head_dim), (WIDTHS, width)):
            for name in names:
                if isinstance(getattr(self.attention, name, None), int):
                    setattr(self.attention, name, value)


def find_heads(model: nn.Module) -> dict[nn.Module, Heads]:
    """Return the heads of a network's attentions by each of their projections."""
    return {layer: heads for module in model.modules() if (heads := _heads(module)) for layer in heads.projections}


def projections(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yield what projects to queries, keys and values, if `module` is an attention of timm or transformers.

    With each comes how many of the three it makes.
    """
    is_attention = any(isinstance(getattr(module, name, None), int) for name in COUNTS)
    if is_attention and type(module).__module__.partition(".")[0] in LIBRARIES:
        for name, child in module.named_children():
            if found := PROJECTION.fullmatch(name):
                yield child, len(found[2]) if found[2] in ("qkv", "kv", "qk") else 1


def _heads(module: nn.Module) -> Heads | None:
    """Return the heads of a module, None if it is no attention that can lose some."""
    found = dict(projections(module))
    number = next((value for name in COUNTS if isinstance(value := getattr(module, name, None), int)), 0)
    widths = {layer.out_features / parts for layer, parts in found.items() if isinstance(layer, nn.Linear)}
    if len(widths) != 1 or not all(isinstance(layer, nn.Linear) for layer in found) or min(widths) % number:
        return None
    return Heads(module, found, int(min(widths)) // number)


@torch.no_grad()
def why_whole(first: Any, heads: Heads, model: nn.Module, example: Tensor) -> str | None:
    """Return why an attention cannot lose heads, None if it can: tried with `first`, the group of its first head.

    The network without this head must compute what the one computes in which nothing reads it.
    """
    paths = {module: path for path, module in model.named_modules()}
    cut, unread = (clone_without_hooks(model).eval() for _ in range(2))
    after = find_heads(cut)[cut.get_submodule(paths[next(iter(heads.projections))])]
    images = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    try:
        for member, indices in first:
            layer = member.target.module
            if (path := paths.get(layer)) is None or getattr(layer, "weight", None) is None:
                continue
            if layer not in heads.projections:
                if first._DG.is_out_channel_pruning_fn(member.handler):
                    return f"its channels meet those of a {type(layer).__name__}"
                unread.get_parameter(f"{path}.weight")[:, indices] = 0
            elif len(indices) != heads.projections[layer] * heads.head_dim:
                return "torch-pruning cannot tell its heads apart"
            member.handler(cut.get_submodule(path), list(indices))
        after.fit()
        same = torch.allclose(main_logits(cut(images)), main_logits(unread(images)), rtol=1e-3, atol=1e-4)
    except Exception as error:
        return f"without a head it does not run ({cause(error)})"
    return None if same else "without a head it computes something else"
