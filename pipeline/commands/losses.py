"""Print the losses that a recipe's `[[distill]]` entries may name, as a table, or one of them in full."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.terminal.output import console, new_table
from stages.list_losses import EVERY_ENTRY, ON_LOGITS, Key, Loss, spelled
from stages.losses.entry import Entry, Response
from stages.losses.selection import Selection
from stages.schedules import Ramp

if TYPE_CHECKING:
    from rich.console import Console


def print_losses(losses: Sequence[Loss]) -> None:
    """Print a table of losses to stdout."""
    out = console()
    table = new_table("Losses for [[distill]] entries", show_lines=True)
    table.add_column("loss", no_wrap=True)
    table.add_column("minimizes, and paper", min_width=30)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("other keys", max_width=25)
    table.add_column("requires from the store", max_width=23)
    table.add_column("per", no_wrap=True)
    for loss in losses:
        weight = next(spelled(key.default) for key in loss.keys if key.name == "weight")
        own = [_with_default(key) for key in loss.keys if key.shared_by is None]
        table.add_row(
            loss.name, f"{loss.minimised}\n{loss.paper}", weight, "\n".join(own) or "-", _needs(loss), _per(loss)
        )
    out.print(table)
    for whose in (EVERY_ENTRY, ON_LOGITS):
        shared = {key.name: _with_default(key) for loss in losses for key in loss.keys if key.shared_by == whose}
        shared.pop("weight", None)  # has its own column
        out.print(f"Keys of {whose}: {', '.join(shared.values())}.")
    out.print("A loss per sample supports sample weights; a loss per batch compares samples with each other.")
    out.print("One loss with all its keys: kdpipe losses NAME.")


def print_loss(loss: Loss) -> None:
    """Print one loss with its description and all its keys to stdout."""
    out = console()
    out.print(f"{loss.name}: {loss.paper}", style="bold")
    out.print()
    _print_paragraphs(out, loss.description)
    out.print(f"Requires from the store: {_needs(loss, ', ')}.")
    for sentence in _limits(loss):
        out.print(sentence)
    table = new_table("Keys")
    for header in ("key", "default", "takes"):
        table.add_column(header)
    for key in loss.keys:
        table.add_row(key.name, "required" if key.required else spelled(key.default), key.type)
    out.print(table)
    _print_shared(out, {key.shared_by for key in loss.keys})
    if any("ramp" in key.type for key in loss.keys):
        out.print('A ramp is a table, such as { start = 0.0, end = 1.0, shape = "linear", epochs = [0, 10] }.')
        _print_paragraphs(out, inspect.cleandoc(Ramp.__doc__ or ""))


def _print_shared(out: Console, shared: set[str | None]) -> None:
    """Print the keys shared with other losses. Further paragraphs of `Entry` are for authors of losses."""
    out.print(f"Of {EVERY_ENTRY}:", style="bold")
    _print_paragraphs(out, inspect.cleandoc(Entry.__doc__ or "").partition("\n\n")[0])
    out.print("Of its samples:", style="bold")
    _print_paragraphs(out, inspect.cleandoc(Selection.__doc__ or ""))
    if ON_LOGITS in shared:
        out.print(f"Of {ON_LOGITS}:", style="bold")
        _print_paragraphs(out, inspect.cleandoc(Response.__doc__ or ""))


def _print_paragraphs(out: Console, text: str) -> None:
    """Print each paragraph of a docstring, rewrapped."""
    for paragraph in text.split("\n\n"):
        out.print(" ".join(paragraph.split()))
        out.print()


def _limits(loss: Loss) -> Iterator[str]:
    if loss.per_sample:
        yield "Per-sample loss: supports sample weights."
    else:
        yield "Per-batch loss, over all processes together: does not support sample weights."
    if loss.whole_logits:
        yield "Requires the logits of all classes: a top-k store is not enough."
    if loss.one_label:
        yield "Does not support mixed samples (MixUp, CutMix), which have two labels."
    if loss.input_gradient:
        yield "Uses the gradient of the student's loss with respect to the pixels: takes a second backward pass."
    if loss.num_others:
        read = ", whose features are read at every step by default" if loss.reads_others else ""
        yield f"Contrasts each batch with {loss.num_others:,} other samples of the data set{read}."


def _needs(loss: Loss, separator: str = "\n") -> str:
    parts: list[str] = []
    for array in loss.stored:
        size = ", at most at the student's size" if array.to_students_size else ""
        parts.append(f"{array.text}{size}{'' if array.of == 'any' else f' ({array.of} maps)'}")
    if loss.whole_logits:
        parts[0] += " of all classes"
    if loss.reads_others:
        parts[-1] += f", also of {loss.num_others:,} other samples"
    return separator.join(parts)


def _per(loss: Loss) -> str:
    return "sample" if loss.per_sample else "batch"


def _with_default(key: Key) -> str:
    return f"{key.name} (required)" if key.required else f"{key.name} = {spelled(key.default)}"
