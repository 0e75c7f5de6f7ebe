"""The recipe's `compress.prune` section."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from kdpipe.stages.config import Count, section


@section
class PruneConfig:
    """Configuration of pruning.

    Attributes:
        kind: "channels" removes them and makes the layers narrower; "blocks" removes blocks that keep their input's
            shape, the ones without which the student stays nearest to the stored logits; "blocks+channels" does both,
            blocks first. "low-rank" makes two narrow layers of each wide one, with the ranks that keep the student
            nearest to the stored logits. "weights" zeroes single weights of convolutions and linear layers; "2:4"
            zeroes two in every four of them along the input channels.
        ratio: the share removed of what `budget` counts in the unpruned student; of the weights for the other kinds.
        budget: "channels" removes `ratio` of the prunable channels, "blocks" of the blocks: the defaults of these
            kinds. "parameters", the default of "low-rank", "macs" and "latency" remove as few as leave at most
            1 - ratio of the whole network's.
        depth_share: the part of the reduction that "blocks+channels" reaches by blocks: they leave the share
            (1 - ratio) ** depth_share, of which the channels leave the rest.
        importance: "l1" is the mean L1 norm of the weights that read or write a channel, over its group; the lowest
            are removed. "l2" is their L2 norm, "taylor" the sum of |weight * gradient|, "bn_scale" the scale of the
            batch norms.
        importance_batches: batches over which the gradients of "taylor" are summed, and blocks and ranks are chosen.
        scope: "layer" removes the same share of every group; "global" removes the least important channels of the
            whole network, each group's importance divided by its mean, or its smallest weights.
        max_ratio: the largest share that "global" may remove of one group or layer, and of the blocks; "low-rank" of a
            layer's weights.
        round_to: widths and ranks are rounded to a multiple of this, so that layers stay on onnxruntime's fast
            kernels, where 29 channels cost half as much again as 32.
        heads: whether attentions of ViTs of timm and transformers lose whole heads, too; each counts as one channel.
        exclude: module paths, layers or whole blocks, all of whose output channels, or weights, stay; they are not
            removed as blocks either.
        steps: the number of equal steps, with epochs_per_step epochs of fine-tuning between them.
    """

    kind: Literal["channels", "blocks", "blocks+channels", "low-rank", "weights", "2:4"] = "channels"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    budget: Literal["channels", "blocks", "parameters", "macs", "latency"] | None = None
    depth_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    importance: Literal["l1", "l2", "taylor", "bn_scale"] = "l1"
    importance_batches: Count = 8
    scope: Literal["global", "layer"] = "layer"
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.9
    round_to: Annotated[int, Field(ge=1, le=2**20)] = 8
    heads: bool = False
    exclude: tuple[str, ...] = ()
    steps: Count = 1
    epochs_per_step: Count = 2

    def __post_init__(self) -> None:
        if self.budget is None:
            own = "parameters" if self.lowers_ranks else "blocks" if self.removes_blocks else "channels"
            object.__setattr__(self, "budget", own)
        if self.removes_blocks:
            self._check_blocks()
        elif self.lowers_ranks:
            self._check_ranks()
        elif self.budget == "blocks":
            raise ValueError('budget = "blocks" needs kind = "blocks"')
        if not self.zeroes_weights:
            return
        if self.budget != "channels":
            raise ValueError(
                f'budget = "{self.budget}" needs kind = "channels": zeroed weights make no network smaller'
            )
        if self.heads:
            raise ValueError('heads = true needs kind = "channels": zeroed weights leave all heads')
        if self.importance not in {"l1", "l2"}:
            raise ValueError(f'importance = "{self.importance}" needs kind = "channels": weights go by magnitude')
        if self.kind == "2:4" and (self.ratio, self.steps, self.scope) != (0.5, 1, "layer"):
            raise ValueError('kind = "2:4" zeroes half of every layer at once: leave out ratio, steps and scope')

    def _check_blocks(self) -> None:
        if self.kind == "blocks+channels" and self.budget in {"channels", "blocks"}:
            raise ValueError('kind = "blocks+channels" needs a budget of both: "parameters", "macs" or "latency"')
        if self.budget == "channels":
            raise ValueError('budget = "channels" needs kind = "channels": blocks leave as blocks')
        if self.kind == "blocks" and (self.importance, self.scope, self.heads) != ("l1", "layer", False):
            raise ValueError(
                'kind = "blocks" ranks whole blocks by the stored logits: leave out importance, scope and heads'
            )

    def _check_ranks(self) -> None:
        if self.budget in {"channels", "blocks"}:
            raise ValueError('kind = "low-rank" needs a budget of "parameters", "macs" or "latency"')
        if (self.importance, self.scope, self.heads) != ("l1", "layer", False):
            raise ValueError('kind = "low-rank" ranks by the stored logits: leave out importance, scope and heads')

    @property
    def lowers_ranks(self) -> bool:
        return self.kind == "low-rank"

    @property
    def is_ranked(self) -> bool:
        """Whether the stored logits decide what goes."""
        return self.removes_blocks or self.lowers_ranks

    @property
    def removes_blocks(self) -> bool:
        return self.kind.startswith("blocks")

    @property
    def zeroes_weights(self) -> bool:
        return self.kind in {"weights", "2:4"}

    @property
    def parts(self) -> tuple[PruneConfig, ...]:
        """The prunings done one after the other: each of one kind."""
        if self.kind != "blocks+channels":
            return (self,)
        ratio = 1 - (1 - self.ratio) ** self.depth_share
        blocks = replace(self, kind="blocks", ratio=ratio, importance="l1", scope="layer", heads=False)
        return blocks, replace(self, kind="channels")
