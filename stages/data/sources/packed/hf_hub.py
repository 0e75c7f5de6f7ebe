"""Load data sets with the library `datasets`: from folders, from the Hugging Face hub, or from its cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdpipe.stages.errors import DataError, cause

CONNECT_TIMEOUT_S = 10.0


def load_hf_dataset(text: str, folder: Path, title: str, *, download: bool) -> Mapping[str, Any]:
    """Return the data sets by split, as the library names these."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("hf_dataset:NAME needs the library datasets: pip install 'kdpipe[datasets]'.") from error
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    name, _, config = text.partition(":")
    if not folder.is_dir() and (text.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"no folder {folder}: hf_dataset:PATH is relative to data.root unless absolute.")
    try:
        with _quiet(), _hub(folder, download=download) as unreachable:
            if saved:
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config or None)
    except Exception as error:  # of damaged files anything
        if folder.is_dir():
            raise DataError(
                f"{folder} cannot be read as a data set of the library datasets ({cause(error)})."
            ) from error
        why = f"the hub cannot be reached: {unreachable}" if unreachable else cause(error)
        raise DataError(
            f"{title} is no folder {folder}, and cannot be loaded from the Hugging Face hub or its cache ({why}): "
            "check the name, the network and HF_HUB_OFFLINE."
        ) from error
    return found if isinstance(found, dict) else {str(found.split or "train"): found}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from drawing progress bars."""
    import datasets

    drawn = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            datasets.enable_progress_bars()


def _unreachable(*, download: bool) -> str:
    """Return why the hub cannot be asked; "" if it can. The library would try for half a minute."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not download:
        return "data.download is false"
    try:
        httpx.head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except httpx.HTTPError as error:
        return cause(error)
    return ""


@contextmanager
def _hub(folder: Path, *, download: bool) -> Iterator[str]:
    """Let the library use its cache alone where the hub cannot be asked; yield why."""
    import datasets
    from huggingface_hub import constants

    why = "" if folder.is_dir() else _unreachable(download=download)
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if why:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
