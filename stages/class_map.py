"""Teachers of other classes than the student's: which of theirs are which of the student's, and what that makes of
their logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.datasets.image_set import ImageSet
from stages.errors import RecipeError
from stages.features import TeacherOutputs
from stages.forms import Wanted
from store import StoreError, TargetStore

SAME: Literal["same"] = "same"

ClassMapConfig = Literal["same", "names"] | dict[str, str]
"""`same`: the teacher's classes are the student's, one by one; `names`: those of equal names are; or a table of the
teacher's names with the student's.
"""

ABSENT = -1e4
"""The logit of a class of which a teacher knows nothing: no probability at any temperature below some hundreds, and,
unlike minus infinity, nothing that a divergence would turn into NaN."""


@dataclass(frozen=True)
class ClassMap:
    """For each of the teacher's classes the student's, or -1: int64 [C_teacher]."""

    student_class: NDArray[np.int64]
    num_classes: int

    @property
    def covers_all(self) -> bool:
        """Whether the teacher knows all of the student's classes."""
        return len(np.unique(self.student_class[self.student_class >= 0])) == self.num_classes

    def to_student(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The teacher's labels [N] as the student's; -1 for those that the student has not."""
        return self.student_class[labels]

    def map_logits(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits [B, C_teacher] to [B, num_classes], right in a softmax at `temperature`: several classes of the
        teacher's that are one of the student's add up, those that the student has not are left out.
        """
        mapped = logits.new_full((len(logits), self.num_classes), ABSENT)
        kept = np.flatnonzero(self.student_class >= 0)
        mapped[:, torch.from_numpy(self.student_class[kept])] = logits[:, torch.from_numpy(kept)]
        known, counts = np.unique(self.student_class[kept], return_counts=True)
        for one in known[counts > 1]:
            members = torch.from_numpy(np.flatnonzero(self.student_class == one))
            mapped[:, int(one)] = temperature * torch.logsumexp(logits[:, members] / temperature, 1)
        return mapped


@dataclass(frozen=True)
class MappedOutputs:
    """What a teacher of other classes says, in the student's."""

    inner: TeacherOutputs
    class_map: ClassMap

    @property
    def features(self) -> Mapping[Wanted, Tensor]:
        return self.inner.features

    def logits_at(self, temperature: float) -> Tensor:
        return self.class_map.map_logits(self.inner.logits_at(temperature), temperature)

    def rows(self, index: Tensor) -> MappedOutputs:
        return MappedOutputs(self.inner.rows(index), self.class_map)


def read_class_map(store: TargetStore, image_set: ImageSet, config: ClassMapConfig) -> ClassMap | None:
    """The map from a store's classes to the data set's; None where they are the same.

    Raises StoreError where they are said to be the same and are not as many, RecipeError for names that are not there.
    """
    if config == SAME:
        if store.num_classes != image_set.num_classes:
            raise StoreError(
                f"{store.path} has logits of {store.num_classes} classes, the data set has {image_set.num_classes}: "
                "cache a teacher of these classes, or say which are which with student.teachers.classes."
            )
        return None
    theirs, ours = _stored_names(store), list(image_set.class_names)
    pairs = {name: name for name in theirs if name in ours} if isinstance(config, str) else config
    if not pairs:
        raise RecipeError(
            f"{store.path} and the data set share no class names ({_some(theirs)}; {_some(ours)}): give a table, as in "
            "student.teachers.classes = [{ tabby = 'cat' }]."
        )
    student_class = np.full(len(theirs), -1, np.int64)
    for their, our in pairs.items():
        student_class[_find(their, theirs, f"the teacher of {store.path}")] = _find(our, ours, "the data set")
    return ClassMap(student_class, image_set.num_classes)


def _stored_names(store: TargetStore) -> list[str]:
    names: Any = store.manifest.identity.data.get("classes")
    if not isinstance(names, list) or len(names) != store.num_classes:
        raise StoreError(f"{store.path} does not say what its classes are called: they cannot be mapped by name.")
    return [str(name) for name in names]


def _find(name: str, names: Sequence[str], whose: str) -> int:
    """Where a class stands. Raises RecipeError, with the nearest names, where there is no such one, or several."""
    if (count := names.count(name)) > 1:
        raise RecipeError(
            f"student.teachers.classes: {whose} has {count} classes called {name!r}: classes can be mapped where each "
            "has a name of its own."
        )
    if count:
        return names.index(name)
    near = get_close_matches(name, names, 3, 0.4) or list(names[:3])
    raise RecipeError(f"student.teachers.classes: {whose} has no class {name!r}; nearest: {', '.join(near)}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
