"""Transcode a target store into another, without the teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kdpipe.pipeline.commands.store.info import describe_encoding_error
from kdpipe.pipeline.session.signals import handle_signals
from kdpipe.pipeline.terminal.output import printable
from kdpipe.pipeline.terminal.progress import reporter
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.store import Codec, TranscodeOptions, default_staging_cache, default_temperatures, is_url, stage, transcode
from kdpipe.store.format.encodings.topk import MAX_TEMPERATURE, MIN_TEMPERATURE


def parse_codec(archive: str | None, level: int | None) -> Any:
    """Return the codec for --archive and --level; options that contradict each other are a RecipeError."""
    if archive in (None, "none") and level is not None:
        raise RecipeError("--level needs --archive zstd or --archive blosc.")
    if archive is None:
        return "keep"
    if archive == "none":
        return "zero-copy"
    try:
        return Codec(archive, 5 if level is None else level)
    except ValueError as error:
        raise RecipeError(f"--archive and --level name {error}; --archive none decompresses a store.") from error


def parse_temperatures(span: tuple[float, float] | None) -> tuple[float, ...] | None:
    """Return the grid of temperatures from the lowest to the highest of `span`."""
    if span is None:
        return None
    if not MIN_TEMPERATURE <= span[0] <= span[1] <= MAX_TEMPERATURE:
        raise RecipeError(
            f"--temperatures takes the lowest and the highest, both from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g}, not {span[0]:g} and {span[1]:g}."
        )
    return default_temperatures(*span)


def run_transcode(source: str, target: Path, options: TranscodeOptions, as_json: bool) -> dict[str, Any]:
    """Transcode with progress and signals, after staging a URL; return sizes and encoding errors."""
    with handle_signals() as should_stop, reporter(as_json) as report:

        def on_unit(done: int, total: int) -> None:
            report(ProgressEvent("store transcode", str(target), done, total, "unit"))

        path = stage(source, default_staging_cache(os.environ)) if is_url(source) else Path(source)
        figures = transcode(path, target, options, on_unit, should_stop)
        if not figures["complete"]:
            raise StoppedEarly
    return figures


def print_transcoded(source: str, target: Path, figures: dict[str, Any]) -> None:
    """Print sizes and encoding errors to stdout."""
    before, after = figures["bytes_before"], figures["bytes_after"]
    print(printable(f"{target}: {after:,} bytes, {after / before:.2f} of {source}'s {before:,}"))  # noqa: T201
    for name, error in figures["fidelity"].items():
        print(printable(f"  {name}: {describe_encoding_error(error)}"))  # noqa: T201
