"""The grid of a sweep: a student and its losses for each combination of the values in the recipe's section `sweep`."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from kdpipe.pipeline.recipe.messages import Keys, fault_messages, first_and_more, one_line
from kdpipe.pipeline.recipe.overrides import set_key
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.config import section
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.registry import AnyLoss
from kdpipe.store.format.identity import sha256_of

MAX_POINTS = 10_000

FIXED = (
    *(f"student.{key}" for key in ("seeds", "stores", "teachers", "baseline", "export")),
    *(f"compress.{key}" for key in ("baselines", "student", "latency_batch_sizes", "latency_rounds", "niceness")),
)
"""Keys that are the same in all points: what they decide is not a setting of one training."""


@dataclass(frozen=True)
class SweepPoint:
    """One combination of a sweep.

    Attributes:
        name: Its settings by the shortest names that tell the keys apart, such as "lr=0.05,temperature=4".
        settings: The values by dotted key.
        student: The student with these settings.
        losses: Its losses.
        compress: How it is compressed, where that is searched.
    """

    name: str
    settings: Mapping[str, Any]
    student: StudentConfig
    losses: tuple[Loss, ...]
    compress: CompressConfig = field(default_factory=CompressConfig)

    @property
    def of_student(self) -> dict[str, Any]:
        """The settings that a student alone has too."""
        return {key: value for key, value in self.settings.items() if not _is_of_losses(key)}


@section
class _Swept:
    """What a sweep or a search can change."""

    student: StudentConfig
    distill: tuple[AnyLoss, ...] = ()
    compress: CompressConfig = Field(default_factory=CompressConfig)


def sweep_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the texts of --set, of which those with several values, KEY=A,B, set the section `sweep`."""
    return [_as_sweep(text) for text in overrides]


def _as_sweep(override: str) -> str:
    key, _, text = override.partition("=")
    values = _several(text.strip())
    if values is None or key.strip().split(".")[0] == "sweep":
        return override
    return f"sweep.{key.strip()}=[{', '.join(values)}]"


def _several(text: str) -> list[str] | None:
    """Return the values, as TOML, of texts such as "0.1,0.2", "cosine,step" and "[1,2],[3]"; None for a single one."""
    if "," not in text:
        return None
    try:
        values = tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        words = [word.strip() for word in text.split(",")]
        if not all(re.fullmatch(r"[\w.:/+-]+", word) for word in words):
            return None  # one text with a comma
        return [json.dumps(word) if _is_text(word) else word for word in words]
    return [inline_toml(value) for value in values] if len(values) > 1 else None


def _is_text(word: str) -> bool:
    try:
        tomllib.loads(f"value = {word}")
    except tomllib.TOMLDecodeError:
        return True
    return False


def as_override(key: str, value: Any) -> str:
    """Return a setting as an option that can be pasted into a shell."""
    return shlex.join(["--set", f"{key}={value if isinstance(value, str) else inline_toml(value)}"])


def inline_toml(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml_key(key)} = {inline_toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def sweep_points(sweep: Mapping[str, Any], student: StudentConfig, losses: Sequence[Loss]) -> list[SweepPoint]:
    """Return all combinations of a sweep's values, the last key changing fastest.

    Args:
        sweep: Lists of values by key, nested as in the recipe.
        student: The recipe's student.
        losses: The recipe's losses.

    Raises:
        RecipeError: A key is none of `student` or `distill`, its values are no list, or a value is invalid.
    """
    axes = dict(flattened(sweep))
    num_points = 1
    for key, values in axes.items():
        require_of_student(key, f"sweep.{key}", "a sweep")
        _require_axis(key, values)
        num_points *= len(values)
    if num_points > MAX_POINTS:
        raise RecipeError(f"the sweep has {num_points:,} combinations, and {MAX_POINTS:,} are allowed: leave some out.")
    base = table_of(student, losses)
    short = short_names(list(axes))
    points = []
    for values in itertools.product(*axes.values()) if axes else ():
        settings = dict(zip(axes, values, strict=True))
        name = ",".join(f"{short[key]}={_shown(value)}" for key, value in settings.items())
        points.append(_point(name, settings, base))
    return points


def flattened(
    table: Mapping[str, Any], is_value: Callable[[Any], bool] = lambda value: False, keys: Keys = ()
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested sections; a section that `is_value` is a value itself."""
    for key, value in table.items():
        if isinstance(value, Mapping) and not is_value(value):
            yield from flattened(value, is_value, (*keys, key))
        else:
            yield ".".join((*keys, key)), value


def require_of_student(key: str, where: str, what: str, sections: Sequence[str] = ("student", "distill")) -> None:
    """Require that a key is a setting of a single training from one store; `what` tries it, as messages say.

    Raises:
        RecipeError: It is in none of the `sections`, or the same for all trainings.
    """
    first = key.split(".", maxsplit=1)[0]
    if first not in sections:
        raise RecipeError(
            one_line(
                f"{where}: {what} trains students from one store, and {first!r} is not part of the student: "
                f"name keys of {' and '.join(sections)}, and use a recipe each for anything else."
            )
        )
    if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
        raise RecipeError(one_line(f"{where}: this key is the same for all settings: set {key} itself."))


def _require_axis(key: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise RecipeError(one_line(f"sweep.{key} = {str(values)[:80]}: name a list of values, such as [0.05, 0.1]."))
    if any(value in values[:number] for number, value in enumerate(values)):
        raise RecipeError(one_line(f"sweep.{key} has a value twice: {str(values)[:80]}."))


def table_of(student: StudentConfig, losses: Sequence[Loss]) -> dict[str, Any]:
    """Return the sections `student` and `distill` as a recipe's table, every key with its value."""
    return {"student": asdict(student), "distill": [asdict(loss) for loss in losses]}


def _point(name: str, settings: Mapping[str, Any], base: Mapping[str, Any]) -> SweepPoint:
    table = copy.deepcopy(dict(base))
    for key, value in settings.items():
        set_key(table, tuple(key.split(".")), value, f"sweep.{key}")
    return point_of(table, name, settings, f"sweep, {name}")


def point_of(table: Mapping[str, Any], name: str, settings: Mapping[str, Any], where: str) -> SweepPoint:
    """Return the student and losses of a recipe's table. Raises RecipeError, naming `where`, if it is invalid."""
    try:
        found: _Swept = TypeAdapter(_Swept).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise RecipeError(first_and_more(fault_messages(_Swept, error, lambda keys: where))) from error
    return SweepPoint(name, settings, found.student, found.distill, found.compress)


def alone_of(point: SweepPoint) -> StudentConfig:
    """Return the student alone that a point is compared with: the same, without what only losses use."""
    return replace(point.student, hard_label_weight=StudentConfig.hard_label_weight)


def _is_of_losses(key: str) -> bool:
    return key.startswith(("distill.", "student.hard_label_weight"))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest ends of the keys that tell them apart."""

    def end(key: str, length: int) -> str:
        return ".".join(key.split(".")[-length:])

    names = {}
    for key in keys:
        lengths = range(1, len(key.split(".")) + 1)
        unique = (n for n in lengths if sum(end(key, n) == end(other, n) for other in keys) == 1)
        names[key] = end(key, next(unique))
    return names


def _shown(value: Any) -> str:
    """Return a value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value, separators=("+", "-"))
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "", text)
    return plain if plain == text and len(plain) <= 40 else f"{plain[:24]}-{sha256_of(value)[:6]}"
