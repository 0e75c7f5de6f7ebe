"""`kdpipe store transcode`: one store made into another, without the teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.commands.store.info import describe_loss
from pipeline.session.signals import stop_when_asked
from pipeline.terminal.output import printable
from pipeline.terminal.progress import reporter
from stages.errors import RecipeError, StoppedEarly
from stages.watch import Event
from store import Change, Codec, default_area, default_temperatures, is_url, stage, transcode
from store.topk import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE


def wanted_codec(archive: str | None, level: int | None) -> Any:
    """What `--archive` and `--level` ask for. Raises RecipeError for a codec that does not exist."""
    if archive is None and level is not None:
        raise RecipeError("--level goes with --archive zstd or --archive blosc.")
    if archive is None:
        return "as it is"
    if archive == "none":
        if level is not None:
            raise RecipeError("--level goes with --archive zstd or --archive blosc: --archive none unpacks a store.")
        return "zero-copy"
    try:
        return Codec(archive, 5 if level is None else level)
    except ValueError as error:
        raise RecipeError(f"--archive and --level name {error}; --archive none unpacks a store.") from error


def wanted_temperatures(span: tuple[float, float] | None) -> tuple[float, ...] | None:
    """The grid of temperatures from the lowest to the highest of `span`. Raises RecipeError where there is none."""
    if span is None:
        return None
    if not LOWEST_TEMPERATURE <= span[0] <= span[1] <= HIGHEST_TEMPERATURE:
        raise RecipeError(
            f"--temperatures takes the lowest and the highest, both from {LOWEST_TEMPERATURE:g} to "
            f"{HIGHEST_TEMPERATURE:g}, not {span[0]:g} and {span[1]:g}."
        )
    return default_temperatures(*span)


def run_transcode(source: str, target: Path, change: Change, as_json: bool) -> dict[str, Any]:
    """Transcode under progress and signals; a URL is staged first. Raises StoppedEarly, all whole units kept, when a
    signal says to stop.
    """
    with stop_when_asked() as should_stop, reporter(as_json) as report:

        def on_unit(done: int, total: int) -> None:
            report(Event("store transcode", str(target), done, total, "unit"))

        where = stage(source, default_area(os.environ)) if is_url(source) else Path(source)
        figures = transcode(where, target, change, on_unit, should_stop)
        if not figures["complete"]:
            raise StoppedEarly
    return figures


def print_transcoded(source: str, target: Path, figures: dict[str, Any]) -> None:
    """What came of it, for people."""
    before, after = figures["bytes_before"], figures["bytes_after"]
    print(printable(f"{target}: {after:,} bytes, {after / before:.2f} of {source}'s {before:,}"))  # noqa: T201
    for name, lost in figures["fidelity"].items():
        print(printable(f"  {name}: {describe_loss(lost)}"))  # noqa: T201
