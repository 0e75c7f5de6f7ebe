"""The recipe's `[[distill]]` entries as modules: each picks its teacher and its samples, and has its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.features import Outputs, TeacherOutputs
from stages.forms import Wanted
from stages.losses.at import ATConfig
from stages.losses.at_gradient import ATGradientConfig
from stages.losses.cc import CCConfig
from stages.losses.crd import CRDConfig
from stages.losses.dist import DISTConfig
from stages.losses.dkd import DKDConfig
from stages.losses.entry import Entry, Response
from stages.losses.fitnet import FitNetConfig
from stages.losses.global_batch import num_processes, total
from stages.losses.hint import HintConfig
from stages.losses.kd import KDConfig
from stages.losses.logit_mse import LogitMSEConfig
from stages.losses.mlld import MLLDConfig
from stages.losses.nkd import NKDConfig
from stages.losses.nst import NSTConfig
from stages.losses.pkt import PKTConfig
from stages.losses.review_kd import ReviewKDConfig
from stages.losses.rkd import RKDConfig
from stages.losses.said import Facts, Others, Said, Shapes, TeacherShapes
from stages.losses.selection import chosen, weights
from stages.losses.simkd import SimKDConfig
from stages.losses.sp import SPConfig
from stages.losses.standardise import Standardised, standardised
from stages.losses.vid import VIDConfig
from stages.schedules import Moment, amount_at
from stages.teachers import Combination

AnyLoss = (
    KDConfig
    | DKDConfig
    | DISTConfig
    | NKDConfig
    | MLLDConfig
    | LogitMSEConfig
    | HintConfig
    | FitNetConfig
    | ATConfig
    | ATGradientConfig
    | NSTConfig
    | VIDConfig
    | ReviewKDConfig
    | SimKDConfig
    | RKDConfig
    | SPConfig
    | PKTConfig
    | CCConfig
    | CRDConfig
)

LossConfig = Annotated[AnyLoss, Field(discriminator="loss")]

LOSSES: tuple[type[Entry], ...] = get_args(get_args(LossConfig)[0])
"""The sections of all losses, as `kdpipe losses` lists them."""


@dataclass(frozen=True)
class Exchange:
    """What a student says about a batch, and what all its teachers do.

    known: for each teacher, which of the samples it knows, bool [B] on the CPU; None for all. labels, ranks: int64 [B].
    others: by loss, the samples that it contrasts with. input_gradient: as in `Said`. num_samples: how many the batches
    of all processes have together; None for as many as are here.
    """

    student: Outputs
    teachers: Sequence[TeacherOutputs]
    known: Sequence[Tensor | None]
    labels: Tensor
    ranks: Tensor
    moment: Moment
    others: Mapping[str, Others]
    input_gradient: Tensor | None = None
    num_samples: int | None = None


class Term(nn.Module):
    """One entry: the loss of the samples that it is about, times its weight and their share of the batch."""

    def __init__(self, name: str, config: Entry, loss: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.loss = loss

    def forward(self, exchange: Exchange, together: TeacherOutputs) -> Tensor:
        """This process's part of the weighted loss of the global batch: the mean over the processes is that loss."""
        said, judged = self._about(exchange, together)
        whole = len(exchange.labels) if exchange.num_samples is None else exchange.num_samples
        here = len(said.labels)
        # A process without such samples goes the same way as the others: they wait for it where rows are gathered.
        num = total(here) if judged else whole
        if num == 0:
            return exchange.student.logits.new_zeros(())
        counts = weights(self.config.samples, said.teacher, said.labels)
        if here == num == 1 < whole:  # an adapter's norm needs two; the mean of two is that of the one
            said = said.rows(torch.zeros(2, dtype=torch.int64, device=said.labels.device))
        loss: Tensor = self.loss(self._standardised(said))
        if counts is not None:
            loss = counts.to(loss) * loss
        weight = amount_at(self.config.weight, exchange.moment)
        if not self.config.per_sample:
            return weight * (num / whole) * loss.mean()
        return weight * (here * num_processes() / whole) * (loss.mean() if here else loss.sum())

    def _about(self, exchange: Exchange, together: TeacherOutputs) -> tuple[Said, bool]:
        """What is said of the samples that the loss is about, and whether these may be some of the batch only."""
        said, known = self._said(exchange, together), self._known(exchange)
        if known is not None and len(known) < len(said.labels):
            said = said.rows(known.to(said.labels.device, non_blocking=True))
        picked = chosen(self.config.samples, said.teacher, said.labels)
        if picked is not None:
            said = said.rows(picked)
        return said, known is not None or picked is not None

    def _said(self, exchange: Exchange, together: TeacherOutputs) -> Said:
        alone = self.config.store is None and self.config.on_logits
        return Said(
            exchange.student,
            together if alone else exchange.teachers[self.config.store or 0],
            exchange.labels,
            exchange.ranks,
            exchange.moment,
            exchange.others.get(self.name),
            exchange.input_gradient,
        )

    def _known(self, exchange: Exchange) -> Tensor | None:
        """The samples of which this loss's teacher, or any of its teachers, knows, int64 [n]; None where
        that is all of any batch.
        """
        if self.config.store is None and self.config.on_logits:
            masks = list(exchange.known)
        else:
            masks = [exchange.known[self.config.store or 0]]
        held = [mask for mask in masks if mask is not None]
        if len(held) < len(masks):
            return None
        return torch.stack(held).any(0).nonzero()[:, 0]

    def _standardised(self, said: Said) -> Said:
        if not isinstance(self.config, Response) or not self.config.standardize:
            return said
        student = Outputs(standardised(said.student.logits), said.student.features)
        return replace(said, student=student, teacher=Standardised(said.teacher))


class Distillation(nn.Module):
    """All entries of a recipe, and how several teachers are one. What trains with the student is in it."""

    def __init__(self, terms: Mapping[str, Term], combination: Combination) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.combination = combination

    @property
    def configs(self) -> dict[str, Entry]:
        """The entries by the names of their losses in metrics and checkpoints."""
        return {name: term.config for name, term in self.terms.items()}  # type: ignore[misc]

    def forward(self, exchange: Exchange) -> dict[str, Tensor]:
        """The weighted losses by name, in float32 also under mixed precision: sums over batches and maps would
        overflow, or lose what they are about.
        """
        with torch.autocast(exchange.student.logits.device.type, enabled=False):
            return self._losses(replace(exchange, student=exchange.student.widened()))

    def _losses(self, exchange: Exchange) -> dict[str, Tensor]:
        if len(exchange.teachers) == 1 and not self.combination.config.temperatures:
            together = exchange.teachers[0]
        else:
            together = self.combination(exchange.teachers, exchange.known, exchange.labels)
        return {name: term(exchange, together) for name, term in self.terms.items()}


def student_layers(configs: Sequence[Entry]) -> list[str]:
    """The student's modules that these losses hook."""
    return list(dict.fromkeys(layer for config in configs for layer in config.student_layers()))


def wanted_of(configs: Sequence[Entry], student: Shapes, store: int) -> list[Wanted]:
    """What these losses want of the layers of store number `store`'s teacher."""
    own = [config for config in configs if (config.store or 0) == store]
    return list(dict.fromkeys(one for config in own for one in config.wants(student)))


def build_distillation(
    configs: Sequence[Entry],
    student: Shapes,
    teachers: Sequence[TeacherShapes],
    *,
    combination: Combination,
    facts: Facts,
    seed: int,
) -> Distillation:
    """One module a loss, by a name that tells equal ones apart, adapters initialised from `seed`.

    Raises RecipeError where shapes cannot be joined.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        terms = {}
        for number, config in enumerate(configs):
            name = f"{config.loss}_{number}"
            terms[name] = Term(name, config, config.build(student, teachers[config.store or 0], facts))
        return Distillation(terms, combination)
