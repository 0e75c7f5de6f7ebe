"""Whether distillation helped, by how much, how sure that is, and what to try if it did not: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kdpipe.pipeline.report.differences import NetworkDifference
from kdpipe.pipeline.report.formatting import mean_std, share

MIN_VIEWS = 4
"""With fewer views of each image more of them are advised."""

MAX_ADVICE = 3


@dataclass(frozen=True)
class Accuracy:
    """A network's name, test accuracy in percent, and its standard deviation over seeds."""

    name: str
    mean: float
    std: float | None = None

    def __str__(self) -> str:
        return f"{mean_std(self.mean, self.std)} %"


@dataclass(frozen=True)
class Setting:
    """What of a run the advice depends on.

    Attributes:
        has_baseline: Whether the student is trained alone, too.
        num_views: Views of each image; None if it is not known.
        temperatures: Of the losses that have a fixed one.
        last_is_best: Whether the distilled students of all seeds were best after their last epoch.
        at_chance: The names of networks that are no better than guessing.
        tested: What the accuracy is, such as "test accuracy".
        num_labels: The number of labeled training images, where it is a setting; else None.
        num_images: The number of training images, where it is recorded.
    """

    has_baseline: bool = True
    num_views: int | None = None
    temperatures: Sequence[float] = ()
    last_is_best: bool = False
    at_chance: Sequence[str] = ()
    tested: str = "test accuracy"
    num_labels: int | None = None
    num_images: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether distillation helped.

    Attributes:
        result: "helped", "harmed", "unclear", or "unknown" while a student is missing.
        sentence: By how much, and how sure that is.
        share_closed: The share of the gap between the student alone and the teacher that distillation closed; None if
            that gap, or the gain, is not clear.
        advice: What to try, from this run's own figures; nothing if it helped.
    """

    result: Literal["helped", "harmed", "unclear", "unknown"]
    sentence: str
    share_closed: float | None
    advice: Sequence[str]

    @property
    def text(self) -> str:
        """The sentence, and what to try."""
        return f"{self.sentence} To try: {'; '.join(self.advice)}." if self.advice else self.sentence


def setting_of(recipe: Mapping[str, Any], distilled: Sequence[Mapping[str, Any]]) -> Setting:
    """Return the setting of a resolved recipe, which is untrusted, and of the results of its distilled students."""
    data, views, losses = (recipe.get(key) for key in ("data", "views", "distill"))
    labels = data.get("labels") if isinstance(data, Mapping) else None
    num_views = views.get("num_views") if isinstance(views, Mapping) else None
    listed = losses if isinstance(losses, list) else []
    temperatures = [one.get("temperature") for one in listed if isinstance(one, Mapping)]
    best = [(one.get("best_epoch"), one.get("num_epochs")) for one in distilled]
    return Setting(
        has_baseline=recipe["student"].get("baseline", True) is not False,
        num_views=num_views if isinstance(num_views, int) else None,
        temperatures=[float(one) for one in temperatures if isinstance(one, int | float)],
        num_labels=0 if labels == "none" else labels if type(labels) is int else None,
        last_is_best=bool(best) and all(type(epoch) is int and epoch + 1 == num for epoch, num in best),
    )


def verdict(
    accuracies: Mapping[str, Accuracy],
    gain: NetworkDifference | None,
    gap: NetworkDifference | None,
    setting: Setting,
) -> Verdict:
    """Return the verdict on a run.

    Args:
        accuracies: The finished networks by kind, such as "teacher", "alone" and "student".
        gain: The distilled student against the student alone, over the seeds that have both.
        gap: The teacher against the student alone.
        setting: What the advice depends on.
    """
    found = _verdict(accuracies, gain, gap, setting)
    notes = []
    if setting.num_labels is not None:
        of_all = f" of {setting.num_images:,}" if setting.num_images else ""
        notes.append(f"Labeled training images: {setting.num_labels:,}{of_all}.")
    if setting.at_chance:
        notes.append(f"At chance, no better than guessing: {', '.join(setting.at_chance)}.")
    return replace(found, sentence=" ".join([found.sentence, *notes]))


def _verdict(
    accuracies: Mapping[str, Accuracy],
    gain: NetworkDifference | None,
    gap: NetworkDifference | None,
    setting: Setting,
) -> Verdict:
    if gain is None:
        return Verdict("unknown", _unknown(accuracies, setting), None, [])
    alone, student, teacher = (accuracies.get(kind) for kind in ("alone", "student", "teacher"))
    figures = f"the student reaches {student} {setting.tested} distilled and {alone} alone, {gain.points:+.2f} points"
    sentence = f"{figures} ({gain.certainty})."
    if student is not None and student.name in setting.at_chance:
        advice = ["more epochs (student.train.epochs) or a lower student.train.lr, as the student has not learned yet"]
    else:
        advice = list(_advice(gain, gap, teacher, alone, setting))[:MAX_ADVICE]
    if not gain.is_clear:
        return Verdict("unclear", f"Whether distillation helped is not clear: {sentence}", None, advice)
    if gain.points < 0:
        return Verdict("harmed", f"Distillation did harm: {sentence}", None, advice)
    closed = gain.points / gap.points if gap is not None and gap.is_clear and gap.points > 0 else None
    return Verdict("helped", f"Distillation helped: {sentence}{_of_gap(closed, teacher)}", closed, [])


def _of_gap(closed: float | None, teacher: Accuracy | None) -> str:
    if teacher is None:
        return ""
    if closed is None:
        return f" The gap between the student alone and the teacher, {teacher}, is not clear."
    if closed >= 1:
        return f" The teacher reaches {teacher}."
    return f" That closes {share(closed)} of the gap to the teacher's {teacher}."


def _unknown(accuracies: Mapping[str, Accuracy], setting: Setting) -> str:
    if not accuracies:
        return "No network of this run is finished yet."
    student, teacher = accuracies.get("student"), accuracies.get("teacher")
    if student is not None and not setting.has_baseline:
        goal = f"; the teacher reaches {teacher}" if teacher and setting.tested == Setting.tested else ""
        return (
            f"The distilled student reaches {student} {setting.tested}{goal}. It was not trained alone "
            "(student.baseline = false), so that its gain by distillation is not known."
        )
    best = max(accuracies.values(), key=lambda one: one.mean)
    return f"Best network finished so far: {best.name}, {best} {setting.tested}."


def _advice(
    gain: NetworkDifference,
    gap: NetworkDifference | None,
    teacher: Accuracy | None,
    alone: Accuracy | None,
    setting: Setting,
) -> Iterator[str]:
    """Yield what may help, the most likely first."""
    if gap is not None and (gap.points <= 0 or not gap.is_clear):
        yield f"a stronger teacher, as this one reaches {teacher} and the student alone {alone}"
    if not gain.is_clear and gain.interval is not None:
        points = (gain.interval.high - gain.interval.low) / 2
        yield f"more seeds (student.seeds) or test images, as these tell no less than {points:.1f} points apart"
    if setting.last_is_best:
        yield "more epochs (student.train.epochs), as the last one was the best"
    if setting.num_views is not None and setting.num_views < MIN_VIEWS:
        yield f"more views than {setting.num_views} (views.num_views, with views.operations)"
    if setting.temperatures:
        used = setting.temperatures[0]
        yield f"another temperature than {used:g}, such as {used / 2:g} or {2 * used:g}"
