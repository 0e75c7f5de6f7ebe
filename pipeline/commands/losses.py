"""`kdpipe losses`: the losses that a recipe's `[[distill]]` entries may name, as a table, or one of them in full."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stages.list_losses import EVERY_ENTRY, ON_LOGITS, Key, Loss, spelled
from stages.losses.entry import Entry, Response
from stages.losses.selection import Selection
from stages.schedules import Ramp

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_losses(losses: Sequence[Loss]) -> None:
    """All of them, for people, on stdout."""
    console = _console()
    table = _table("Losses: what a [[distill]] entry may name", show_lines=True)
    table.add_column("loss", no_wrap=True)
    table.add_column("what is minimised, and its paper", min_width=30)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("other keys", max_width=25)
    table.add_column("needs stored of the teacher", max_width=23)
    table.add_column("per", no_wrap=True)
    for loss in losses:
        weight = next(spelled(key.default) for key in loss.keys if key.name == "weight")
        own = [_with_default(key) for key in loss.keys if key.shared_by is None]
        table.add_row(
            loss.name, f"{loss.minimised}\n{loss.paper}", weight, "\n".join(own) or "-", _needs(loss), _per(loss)
        )
    console.print(table)
    for whose in (EVERY_ENTRY, ON_LOGITS):
        shared = {key.name: _with_default(key) for loss in losses for key in loss.keys if key.shared_by == whose}
        shared.pop("weight", None)  # a default of its own in every row
        console.print(f"Also of {whose}: {', '.join(shared.values())}.")
    console.print("A loss per sample can weigh its samples; one per batch is about how they lie to each other.")
    console.print("One loss with all its keys: kdpipe losses NAME.")


def print_loss(loss: Loss) -> None:
    """One loss with all that is known of it, for people, on stdout."""
    console = _console()
    console.print(f"{loss.name}: {loss.paper}", style="bold")
    console.print()
    _print_paragraphs(console, loss.description)
    console.print(f"Needs stored of the teacher: {_needs(loss, ', ')}.")
    for sentence in _limits(loss):
        console.print(sentence)
    table = _table("Its keys")
    for header in ("key", "default", "takes"):
        table.add_column(header)
    for key in loss.keys:
        table.add_row(key.name, "to be given" if key.required else spelled(key.default), key.type)
    console.print(table)
    _print_shared(console, {key.shared_by for key in loss.keys})
    if any("ramp" in key.type for key in loss.keys):
        console.print('A ramp is a table, such as { start = 0.0, end = 1.0, shape = "linear", epochs = [0, 10] }.')
        _print_paragraphs(console, inspect.cleandoc(Ramp.__doc__ or ""))


def _print_shared(console: Console, shared: set[str | None]) -> None:
    """What the keys mean that other losses have too. Further paragraphs of `Entry` are for those who write losses."""
    console.print(f"Of {EVERY_ENTRY}:", style="bold")
    _print_paragraphs(console, inspect.cleandoc(Entry.__doc__ or "").partition("\n\n")[0])
    console.print("Of its samples:", style="bold")
    _print_paragraphs(console, inspect.cleandoc(Selection.__doc__ or ""))
    if ON_LOGITS in shared:
        console.print(f"Of {ON_LOGITS}:", style="bold")
        _print_paragraphs(console, inspect.cleandoc(Response.__doc__ or ""))


def _print_paragraphs(console: Console, text: str) -> None:
    """Text with its paragraphs, and a docstring's first line, each wrapped anew."""
    for paragraph in text.split("\n\n"):
        console.print(" ".join(paragraph.split()))
        console.print()


def _limits(loss: Loss) -> Iterator[str]:
    if loss.per_sample:
        yield "A mean of one number a sample: samples can be weighed."
    else:
        yield "One number of the whole batch, of all processes together: samples cannot be weighed."
    if loss.whole_logits:
        yield "Needs the logits of all classes: a store of the largest few does not serve."
    if loss.one_label:
        yield "Has no meaning for mixed samples, which have two labels."
    if loss.input_gradient:
        yield "Looks at the gradient of the student's cross entropy by the pixels, at the price of a second backward."
    if loss.num_others:
        read = ", whose features are read in every step by default" if loss.reads_others else ""
        yield f"Contrasts each batch with {loss.num_others:,} other samples of the data set{read}."


def _needs(loss: Loss, between: str = "\n") -> str:
    parts: list[str] = []
    for one in loss.stored:
        size = ", at the student's size at most" if one.to_students_size else ""
        parts.append(f"{one.text}{size}{'' if one.of == 'any' else f' ({one.of} maps)'}")
    if loss.whole_logits:
        parts[0] += " of all classes"
    if loss.reads_others:
        parts[-1] += f", also of {loss.num_others:,} other samples"
    return between.join(parts)


def _per(loss: Loss) -> str:
    return "sample" if loss.per_sample else "batch"


def _with_default(key: Key) -> str:
    return f"{key.name} (to be given)" if key.required else f"{key.name} = {spelled(key.default)}"


def _console() -> Console:
    from rich.console import Console

    # No markup: [C, H, W] is a shape and no style.
    return Console(width=None if Console().is_terminal else 120, markup=False, highlight=False)


def _table(title: str, *, show_lines: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE, title=title, title_justify="left", show_lines=show_lines)
