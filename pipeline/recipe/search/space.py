"""The space of a search: its parameters, which of them a choice has, and the student of each choice."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kdpipe.pipeline.recipe.messages import one_line
from kdpipe.pipeline.recipe.overrides import set_key
from kdpipe.pipeline.recipe.search.config import SearchConfig
from kdpipe.pipeline.recipe.search.presets import preset_space
from kdpipe.pipeline.recipe.sweep import SweepPoint, flattened, point_of, require_of_student, table_of
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.registry import loss_class
from kdpipe.store.errors import did_you_mean

OFF = "off"
"""The choice of `distill.NUMBER.loss` that leaves the loss out."""

RANGE, CHOICES = {"low", "high", "step", "log"}, {"choices"}
MAX_STRUCTURES = 500
"""Combinations of what decides about others, each of which is tried on blank images before anything is trained."""

MAX_COMBINATIONS = 10_000
"""Combinations of a grid, and steps of a range."""

Settings = Mapping[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Parameter:
    """A key that is searched.

    Attributes:
        key: The dotted key, such as "distill.0.temperature".
        choices: Its values; of a range the ends, or with a step all values.
        low: The lowest value of a range; None for choices.
        high: The highest.
        step: The distance of neighboring values; None if any value may be taken.
        log: Whether the logarithm is sampled evenly.
        when: The choices of other keys with which there is this one.
    """

    key: str
    choices: tuple[Any, ...]
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return self.low is not None and all(type(number) is int for number in (self.low, self.high, self.step))

    def is_in(self, settings: Settings) -> bool:
        """Return whether settings of the parameters before this one have it."""
        entry, _, setting = self.key.partition(".")[2].partition(".")
        if self.key.startswith("distill.") and setting != "loss" and settings.get(f"distill.{entry}.loss") == OFF:
            return False
        return all(key in settings and settings[key] in values for key, values in self.when.items())


@dataclass(frozen=True)
class SearchSpace:
    """The parameters of a search, those that decide about others first, over a recipe's sections."""

    parameters: tuple[Parameter, ...]
    student: StudentConfig
    losses: tuple[Loss, ...]
    compress: CompressConfig

    @property
    def deciding(self) -> tuple[Parameter, ...]:
        """The parameters that decide about others: losses, and what stands in a `when`."""
        named = {key for parameter in self.parameters for key in parameter.when}
        return tuple(one for one in self.parameters if one.key in named or _is_loss(one.key))

    def point(self, settings: Settings, name: str) -> SweepPoint:
        """Return the student and its losses with these settings. Raises RecipeError if they are invalid."""
        table = copy.deepcopy(table_of(self.student, self.losses)) | {"compress": asdict(self.compress)}
        switched = {key: value for key, value in settings.items() if _is_loss(key)}
        for key, loss in switched.items():
            number, shown = key.split(".")[1], f"search.space.{key}"
            set_key(table, ("distill", number, "loss"), loss, shown)  # fails if there is no such entry
            table["distill"][int(number)] = _entry(self.losses[int(number)], loss)
        for key, value in settings.items():
            if key not in switched:
                set_key(table, tuple(key.split(".")), value, f"search.space.{key}")
        table["distill"] = [entry for entry in table["distill"] if entry.get("loss") != OFF]
        shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        return point_of(table, name, settings, one_line(f"search.space, {shown}"))

    def combinations(self, parameters: Sequence[Parameter], chosen: Settings) -> Iterator[dict[str, Any]]:
        """Yield all combinations of the choices of `parameters`, as far as there are such, beside those `chosen`."""
        if not parameters:
            yield dict(chosen)
            return
        first, *others = parameters
        for value in first.choices if first.is_in(chosen) else (None,):
            own = {**chosen, first.key: value} if first.is_in(chosen) else chosen
            yield from self.combinations(others, own)

    def structures(self) -> Iterator[dict[str, Any]]:
        """Yield settings that have every choice at least once, with every choice of what decides about others.

        Numbers from a range are at its low end.
        """
        yield from self._one_by_one(lambda parameter: parameter.low is None)

    def faults(self) -> Iterator[str]:
        """Yield the faults of the recipes in this space, trying every choice and both ends of every range."""
        found = set[str]()
        for settings in self._one_by_one(lambda parameter: True):
            try:
                self.point(settings, "")
            except RecipeError as error:
                key = str(error).partition(": ")[2]
                if key not in found:
                    found.add(key)
                    yield str(error)

    def _one_by_one(self, is_varied: Any) -> Iterator[dict[str, Any]]:
        others = [one for one in self.parameters if one not in self.deciding]
        for chosen in self.combinations(self.deciding, {}):
            active = [one for one in others if one.is_in(chosen)]
            first = {**chosen, **{one.key: one.choices[0] for one in active}}
            yield first
            for one in active:
                for value in one.choices[1:] if is_varied(one) else ():
                    yield {**first, one.key: value}

    def grid(self) -> list[dict[str, Any]]:
        """Return all combinations. Raises RecipeError for a range without a step, or too many of them."""
        for one in self.parameters:
            if one.low is not None and one.step is None:
                raise RecipeError(f"search.space.{one.key}: sampler = 'grid' needs choices, or a range with a step.")
        return _limited(self.combinations(self.parameters, {}), MAX_COMBINATIONS, "combinations")


def search_space(
    config: SearchConfig, student: StudentConfig, losses: Sequence[Loss], compress: CompressConfig
) -> SearchSpace:
    """Return the space that a recipe's section `search` describes.

    Raises:
        RecipeError: A key, a range or a condition is invalid.
    """
    if config.compress and (not compress.steps or compress.student is not None):
        raise RecipeError(
            "search.compress = true: the trials' students are pruned or quantized: name compress.steps, and leave out "
            "compress.student."
        )
    preset = preset_space(config.preset, losses) if config.preset else {}
    entries = {**preset, **dict(flattened(config.space, _is_parameter))}
    sections = ("student", "distill", *["compress"] * config.compress)
    parameters = [_parameter(key, value, sections) for key, value in entries.items()]
    space = SearchSpace(tuple(_ordered(parameters)), student, tuple(losses), compress)
    what = "combinations of losses and of keys in a `when`"
    _limited(space.combinations(space.deciding, {}), MAX_STRUCTURES, what)
    if config.sampler == "grid":
        space.grid()
    return space


def _limited(combinations: Iterator[dict[str, Any]], most: int, what: str) -> list[dict[str, Any]]:
    found = list(itertools.islice(combinations, most + 1))
    if len(found) > most:
        raise RecipeError(f"search.space has more than {most:,} {what}: leave some out.")
    return found


def _is_loss(key: str) -> bool:
    return key.startswith("distill.") and key.split(".")[2:] == ["loss"]


def _is_parameter(table: Mapping[str, Any]) -> bool:
    return bool(table.keys() & (RANGE | CHOICES | {"when"})) or not table


def _parameter(key: str, value: Any, sections: Sequence[str]) -> Parameter:
    where = f"search.space.{key}"
    require_of_student(key, where, "a search", sections)
    table = value if isinstance(value, Mapping) else {"choices": value}
    when = table.get("when", {})
    if not isinstance(when, Mapping) or not all(isinstance(one, list) and one for _, one in flattened(when)):
        raise RecipeError(
            one_line(f'{where}.when: name choices of another key, as in {{ "distill.0.loss" = ["kd"] }}.')
        )
    conditions = {other: tuple(values) for other, values in flattened(when)}
    given = table.keys() - {"when"}
    if given == CHOICES:
        return Parameter(key, _choices(where, table["choices"]), when=conditions)
    if unknown := sorted(given - RANGE):
        raise RecipeError(one_line(f"{where}.{unknown[0]}: {did_you_mean(unknown[0], sorted(RANGE | CHOICES))}"))
    return _range(key, where, table, conditions)


def _choices(where: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        wanted = "name a list of choices, such as [1, 2, 4], or a range such as { low = 1, high = 20 }"
        raise RecipeError(one_line(f"{where} = {str(values)[:80]}: {wanted}."))
    if any(value in values[:number] for number, value in enumerate(values)):
        raise RecipeError(one_line(f"{where} has a choice twice: {str(values)[:80]}."))
    return tuple(values)


def _range(key: str, where: str, table: Mapping[str, Any], when: Mapping[str, tuple[Any, ...]]) -> Parameter:
    low, high, step, log = table.get("low"), table.get("high"), table.get("step"), table.get("log", False)
    numbers: list[Any] = [low, high, *([] if step is None else [step])]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise RecipeError(one_line(f"{where}: a range has numbers `low` and `high`, and may have `step` or `log`."))
    if not isinstance(log, bool):
        raise RecipeError(one_line(f"{where}.log = {str(log)[:80]}: it must be true or false."))
    if not numbers[0] < numbers[1]:
        raise RecipeError(f"{where}: low = {low} must be below high = {high}.")
    if log and (numbers[0] <= 0 or step is not None):
        raise RecipeError(f"{where}: with log = true, `low` must be above 0, and there is no `step`.")
    if step is None:
        ends = float(numbers[0]), float(numbers[1])
        return Parameter(key, ends, *ends, step=None, log=log, when=when)
    return Parameter(key, _steps(where, *numbers), low, high, step, when=when)


def _steps(where: str, low: float, high: float, step: float) -> tuple[float, ...]:
    """Return the values of a range with a step."""
    if step <= 0:
        raise RecipeError(f"{where}: step = {step} must be above 0.")
    num_steps = round((high - low) / step)
    if abs(low + num_steps * step - high) > 1e-9 * max(abs(high), step):
        raise RecipeError(f"{where}: high = {high} is not low = {low} and a number of steps of {step}.")
    if num_steps > MAX_COMBINATIONS:
        raise RecipeError(f"{where}: more than {MAX_COMBINATIONS:,} steps: leave out `step` for any value.")
    return tuple(round(low + number * step, 12) for number in range(num_steps + 1))


def _ordered(parameters: Sequence[Parameter]) -> Iterator[Parameter]:
    """Yield the parameters, those in a `when` before those that have it; losses first.

    Raises:
        RecipeError: A condition names no choice of another parameter, or conditions go in a circle.
    """
    by_key = {one.key: one for one in parameters}
    for one in parameters:
        for key, values in one.when.items():
            _require_condition(one.key, key, values, by_key)
    left, done = sorted(parameters, key=lambda one: not _is_loss(one.key)), set[str]()
    while left:
        ready = next((one for one in left if done >= one.when.keys()), None)
        if ready is None:
            raise RecipeError(f"search.space: the conditions of {', '.join(one.key for one in left)} go in a circle.")
        left.remove(ready)
        done.add(ready.key)
        yield ready


def _require_condition(key: str, other: str, values: Sequence[Any], by_key: Mapping[str, Parameter]) -> None:
    where = f"search.space.{key}.when"
    if other not in by_key or other == key:
        hint = did_you_mean(other, [one for one in by_key if one != key], otherwise="it must be searched, too.")
        raise RecipeError(one_line(f"{where}: {other} is not another key of search.space; {hint}"))
    if by_key[other].low is not None:
        raise RecipeError(one_line(f"{where}: {other} is a range; a condition names choices: give it a list."))
    if unknown := [value for value in values if value not in by_key[other].choices]:
        raise RecipeError(one_line(f"{where}: {str(unknown[0])[:80]!r} is not a choice of {other}."))


def _entry(loss: Loss, name: Any) -> dict[str, Any]:
    """Return the table of an entry whose loss is replaced by another one.

    It keeps what both know and the recipe sets, but the weight, which is no measure for another loss.
    """
    own = asdict(loss)
    if name in (OFF, loss.loss) or not isinstance(name, str):
        return {**own, "loss": name}
    required = {key for key, known in type(loss).__pydantic_fields__.items() if known.is_required()}  # type: ignore[attr-defined]
    defaults = asdict(type(loss)(**{key: getattr(loss, key) for key in required}))
    known = {one.name for one in fields(loss_class(name))} - {"loss", "weight"}
    kept = {key for key in known & own.keys() if key in required or own[key] != defaults[key]}
    return {"loss": name, **{key: own[key] for key in sorted(kept)}}
