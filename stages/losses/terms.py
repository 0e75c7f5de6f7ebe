"""The recipe's `[[distill]]` entries as modules: each says what it needs of teacher and student, and has its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.features import Outputs, TeacherOutputs
from stages.losses.hint import HintConfig, adapter, hint_loss
from stages.losses.kd import KDConfig, kd_loss

LossConfig = Annotated[KDConfig | HintConfig, Field(discriminator="loss")]

Shapes = Mapping[str, tuple[int, ...]]
"""Feature shapes without the batch axis, by module path."""


class KD(nn.Module):
    """Response distillation towards the mean of the stores' logits."""

    def __init__(self, config: KDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: Outputs, teachers: Sequence[TeacherOutputs]) -> Tensor:
        temperature = self.config.temperature
        target = torch.stack([teacher.logits_at(temperature).float() for teacher in teachers]).mean(0)
        return self.config.weight * kd_loss(student.logits, target, temperature)


class Hint(nn.Module):
    """Feature distillation through adapters that train with the student and are not part of it."""

    def __init__(self, config: HintConfig, student: Shapes, teachers: Sequence[Shapes]) -> None:
        super().__init__()
        self.config = config
        teacher = teachers[config.store]
        self.adapters = nn.ModuleList(adapter(student[mine], teacher[theirs]) for mine, theirs in config.layers)

    def forward(self, student: Outputs, teachers: Sequence[TeacherOutputs]) -> Tensor:
        wanted = teachers[self.config.store].features
        parts = [
            hint_loss(adapt(student.features[mine]), wanted[theirs])
            for adapt, (mine, theirs) in zip(self.adapters, self.config.layers, strict=True)
        ]
        return self.config.weight * torch.stack(parts).sum()


def student_layers(configs: Sequence[KDConfig | HintConfig]) -> list[str]:
    """The student's modules that these losses hook."""
    pairs = [pair for config in configs if isinstance(config, HintConfig) for pair in config.layers]
    return list(dict.fromkeys(mine for mine, _ in pairs))


def teacher_layers(configs: Sequence[KDConfig | HintConfig], store: int) -> list[str]:
    """The teacher's modules whose feature maps these losses want of store number `store`."""
    hints = [config for config in configs if isinstance(config, HintConfig) and config.store == store]
    return list(dict.fromkeys(theirs for config in hints for _, theirs in config.layers))


def build_terms(
    configs: Sequence[KDConfig | HintConfig], student: Shapes, teachers: Sequence[Shapes], seed: int
) -> nn.ModuleDict:
    """One module a loss, by a name that tells equal ones apart, adapters initialised from `seed`.

    Raises RecipeError where shapes cannot be joined.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        terms: dict[str, nn.Module] = {}
        for number, config in enumerate(configs):
            term = KD(config) if isinstance(config, KDConfig) else Hint(config, student, teachers)
            terms[f"{config.loss}_{number}"] = term
        return nn.ModuleDict(terms)
