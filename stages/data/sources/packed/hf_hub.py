"""Load data sets with the library `datasets`: from folders, from the Hugging Face hub, or from its cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdpipe.stages.errors import DataError, cause
from kdpipe.stages.runtime.hub import hub_cause, hub_or_cache


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
    refused = "" if download else "data.download is false"
    try:
        with _quiet(), hub_or_cache(refused, local=folder.is_dir()) as why:
            if saved:
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config or None)
    except Exception as error:  # of damaged files anything
        if folder.is_dir():
            raise DataError(
                f"{folder} cannot be read as a data set of the library datasets ({cause(error)})."
            ) from error
        raise DataError(
            f"{title} is no folder {folder}, and cannot be loaded from the Hugging Face hub or its cache "
            f"({hub_cause(error, why)}): check the name, the network and HF_HUB_OFFLINE."
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
