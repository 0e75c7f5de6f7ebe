"""`kdpipe losses`: print the losses that a recipe's `[[distill]]` entries can name, or one of them in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kdpipe.pipeline.terminal.output import console, new_table
from kdpipe.stages.losses.describe import EVERY_ENTRY, ON_LOGITS, Key, LossDescription, attributes_of, description_of
from kdpipe.stages.losses.schedules import Schedule

if TYPE_CHECKING:
    from rich.console import Console


def print_losses(losses: Sequence[LossDescription]) -> None:
    """Print a table of all losses to stdout."""
    output = console()
    table = new_table("Losses of [[distill]] entries", show_lines=True)
    table.add_column("loss", no_wrap=True)
    table.add_column("minimizes, and paper", min_width=30)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("other keys", max_width=25)
    table.add_column("required of the teacher", max_width=23)
    table.add_column("per", no_wrap=True)
    for loss in losses:
        weight = next(key.default_text for key in loss.keys if key.name == "weight")
        own = "\n".join(_with_default(key) for key in loss.keys if key.shared_by is None) or "-"
        per = "sample" if loss.per_sample else "batch"
        table.add_row(loss.name, f"{loss.summary}\n{loss.origin}", weight, own, loss.requires, per)
    output.print(table)
    for group in (EVERY_ENTRY, ON_LOGITS):
        shared = {key.name: _with_default(key) for loss in losses for key in loss.keys if key.shared_by == group}
        shared.pop("weight", None)  # its default differs per loss
        output.print(f"Also of {group}: {', '.join(shared.values())}.")
    output.print("Losses per sample support sample weights; losses per batch compare relations between samples.")
    output.print("All keys of one loss: kdpipe losses NAME.")


def print_loss(loss: LossDescription) -> None:
    """Print the full description of one loss to stdout."""
    output = console()
    output.print(f"{loss.name}: {loss.origin}\n", style="bold")
    _print_paragraphs(output, loss.description)
    output.print(f"Required of the teacher: {loss.requires}.")
    for sentence in _limits(loss):
        output.print(sentence)
    table = new_table("Keys")
    for header in ("key", "default", "takes"):
        table.add_column(header)
    for key in loss.keys:
        table.add_row(key.name, key.default_text, key.type)
    output.print(table)
    for key in loss.keys:
        output.print(f"{key.name}: {key.text}")
    if any("schedule" in key.type for key in loss.keys):
        output.print('\nA schedule is a table, such as { start = 0.0, end = 1.0, shape = "linear", epochs = [0, 10] }.')
        _print_paragraphs(output, description_of(Schedule))
        for name, text in attributes_of(Schedule).items():
            output.print(f"{name}: {text}")


def _print_paragraphs(output: Console, text: str) -> None:
    """Print a docstring, with each paragraph wrapped again."""
    for paragraph in text.split("\n\n"):
        output.print(" ".join(paragraph.split()) + "\n")


def _limits(loss: LossDescription) -> Iterator[str]:
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


def _with_default(key: Key) -> str:
    return f"{key.name} (required)" if key.required else f"{key.name} = {key.default_text}"
