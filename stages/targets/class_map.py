"""Map the classes and logits of a teacher with other classes than the student's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.errors import RecipeError, first_few
from kdpipe.store import StoreError, TargetStore
from kdpipe.store.errors import did_you_mean

SAME: Literal["same"] = "same"

ClassMapConfig = Literal["same", "names"] | dict[str, str]
"""`same`: identical classes, in order; `names`: match by name; or a table from the teacher's names to the student's."""

ABSENT = -1e4
"""The logit of a class that the teacher lacks: zero probability at any temperature below some hundreds.

Minus infinity would make a divergence NaN.
"""


@dataclass(frozen=True)
class ClassMap:
    """A map from the teacher's classes to the student's, int64 [C_teacher], -1 for classes that the student lacks."""

    student_class: NDArray[np.int64]
    num_classes: int

    @property
    def has_all_classes(self) -> bool:
        """Return whether the teacher has all of the student's classes."""
        return len(np.unique(self.student_class[self.student_class >= 0])) == self.num_classes

    def to_student(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Map the teacher's labels [N] to the student's, -1 for classes that the student lacks."""
        return self.student_class[labels]

    def map_logits(self, logits: Tensor, temperature: float) -> Tensor:
        """Map logits [B, C_teacher] to [B, num_classes], for a softmax at `temperature`.

        The probabilities of classes that are the same class of the student are added; classes that the student lacks
        are left out.
        """
        mapped = logits.new_full((len(logits), self.num_classes), ABSENT)
        kept = np.flatnonzero(self.student_class >= 0)
        mapped[:, _indices(self.student_class[kept], logits.device)] = logits[:, _indices(kept, logits.device)]
        classes, counts = np.unique(self.student_class[kept], return_counts=True)
        for student_class in classes[counts > 1]:
            members = _indices(np.flatnonzero(self.student_class == student_class), logits.device)
            mapped[:, int(student_class)] = temperature * torch.logsumexp(logits[:, members] / temperature, 1)
        return mapped


def _indices(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)  # an index on the host would wait for a GPU


def read_class_map(store: TargetStore, image_set: ImageSet, config: ClassMapConfig) -> ClassMap | None:
    """Return the map from a store's classes to the data set's; None if they are the same.

    Raises:
        StoreError: The classes should be the same but differ in number, or the store has no class names.
        RecipeError: A class name does not exist, or is ambiguous.
    """
    if config == SAME:
        if store.manifest.has_logits and store.num_classes != image_set.num_classes:
            raise StoreError(
                f"{store.path} has logits of {store.num_classes} classes, the data set has {image_set.num_classes}: "
                "cache a teacher with these classes, or map them with student.teachers.classes."
            )
        return None
    stored, names = _stored_names(store), list(image_set.class_names)
    pairs = {name: name for name in stored if name in names} if isinstance(config, str) else config
    if not pairs:
        raise RecipeError(
            f"{store.path} and the data set share no class names ({first_few(stored, 3)}; {first_few(names, 3)}): map "
            "them with a table, as in student.teachers.classes = [{ tabby = 'cat' }]."
        )
    student_class = np.full(len(stored), -1, np.int64)
    for teacher_name, student_name in pairs.items():
        teacher_class = _find(teacher_name, stored, f"the teacher of {store.path}")
        student_class[teacher_class] = _find(student_name, names, "the data set")
    return ClassMap(student_class, image_set.num_classes)


def _stored_names(store: TargetStore) -> list[str]:
    names: Any = store.manifest.identity.data.get("classes")
    if not isinstance(names, list) or len(names) != (store.num_classes or len(names)):
        raise StoreError(f"{store.path} has no class names: its classes cannot be mapped by name.")
    return [str(name) for name in names]


def _find(name: str, names: Sequence[str], owner: str) -> int:
    """Return the index of a class. Raises RecipeError, with the nearest names, unless there is exactly one."""
    if (count := names.count(name)) > 1:
        raise RecipeError(
            f"student.teachers.classes: {owner} has {count} classes named {name!r}; class names must be unique to be "
            "mapped."
        )
    if count:
        return names.index(name)
    hint = did_you_mean(name, names, limit=3, otherwise=f"its classes are {first_few(names, 3)}.")
    raise RecipeError(f"student.teachers.classes: {owner} has no class {name!r}; {hint}")
