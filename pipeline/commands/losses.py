"""`kdpipe losses`: print the losses that a recipe's `[[distill]]` entries can name, or one of them in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kdpipe.stages.losses.describe import (
    EVERY_ENTRY,
    ON_LOGITS,
    Key,
    Loss,
    attributes_of,
    description_of,
    format_default,
)
from kdpipe.stages.losses.schedules import Schedule

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_losses(losses: Sequence[Loss]) -> None:
    """Print a table of all losses to stdout."""
    console = _console()
    table = _table("Losses of [[distill]] entries", show_lines=True)
    table.add_column("loss", no_wrap=True)
    table.add_column("minimizes, and paper", min_width=30)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("other keys", max_width=25)
    table.add_column("required of the teacher", max_width=23)
    table.add_column("per", no_wrap=True)
    for loss in losses:
        weight = next(format_default(key.default) for key in loss.keys if key.name == "weight")
        own = [_with_default(key) for key in loss.keys if key.shared_by is None]
        per = "sample" if loss.per_sample else "batch"
        table.add_row(loss.name, f"{loss.summary}\n{loss.paper}", weight, "\n".join(own) or "-", _needs(loss), per)
    console.print(table)
    for group in (EVERY_ENTRY, ON_LOGITS):
        shared = {key.name: _with_default(key) for loss in losses for key in loss.keys if key.shared_by == group}
        shared.pop("weight", None)  # its default differs per loss
        console.print(f"Also of {group}: {', '.join(shared.values())}.")
    console.print("Losses per sample support sample weights; losses per batch compare relations between samples.")
    console.print("All keys of one loss: kdpipe losses NAME.")


def print_loss(loss: Loss) -> None:
    """Print the full description of one loss to stdout."""
    console = _console()
    console.print(f"{loss.name}: {loss.paper}", style="bold")
    console.print()
    _print_paragraphs(console, loss.description)
    console.print(f"Required of the teacher: {_needs(loss, ', ')}.")
    for sentence in _limits(loss):
        console.print(sentence)
    table = _table("Keys")
    for header in ("key", "default", "takes"):
        table.add_column(header)
    for key in loss.keys:
        table.add_row(key.name, "required" if key.required else format_default(key.default), key.type)
    console.print(table)
    for key in loss.keys:
        console.print(f"{key.name}: {key.text}")
    if any("ramp" in key.type for key in loss.keys):
        console.print()
        console.print('A ramp is a table, such as { start = 0.0, end = 1.0, shape = "linear", epochs = [0, 10] }.')
        _print_paragraphs(console, description_of(Schedule))
        for name, text in attributes_of(Schedule).items():
            console.print(f"{name}: {text}")


def _print_paragraphs(console: Console, text: str) -> None:
    """Print a docstring, with each paragraph wrapped again."""
    for paragraph in text.split("\n\n"):
        console.print(" ".join(paragraph.split()))
        console.print()


def _limits(loss: Loss) -> Iterator[str]:
    if loss.per_sample:
        yield "Per-sample loss: supports sample weights."
    else:
        yield "One value for the batch of all processes: sample weights are not supported."
    if loss.whole_logits:
        yield "Needs the logits of all classes: top-k stores cannot be used."
    if loss.one_label:
        yield "Needs a single label per sample: not for mixed samples."
    if loss.input_gradient:
        yield "Uses the input gradient of the student's cross entropy, at the cost of a second backward pass."
    if loss.num_negatives:
        read = ", whose features are read at every step by default" if loss.reads_negatives else ""
        yield f"Contrasts each batch with {loss.num_negatives:,} other samples of the data set{read}."


def _needs(loss: Loss, between: str = "\n") -> str:
    parts: list[str] = []
    for feature in loss.stored:
        size = ", at the student's size at most" if feature.to_students_size else ""
        parts.append(f"{feature.text}{size}{'' if feature.of == 'any' else f' ({feature.of} maps)'}")
    if loss.whole_logits:
        parts[0] += " of all classes"
    if loss.reads_negatives:
        parts[-1] += f", also of {loss.num_negatives:,} other samples"
    return between.join(parts)


def _with_default(key: Key) -> str:
    return f"{key.name} (required)" if key.required else f"{key.name} = {format_default(key.default)}"


def _console() -> Console:
    from rich.console import Console

    # No markup: [C, H, W] is a shape, not a style.
    return Console(width=None if Console().is_terminal else 120, markup=False, highlight=False)


def _table(title: str, *, show_lines: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE, title=title, title_justify="left", show_lines=show_lines)
