"""The Hugging Face hub, from which timm and transformers load: its messages."""

from __future__ import annotations

from kdpipe.stages.errors import cause


def without_messages() -> None:
    """Keep the hub's client from printing its five attempts: the error that ends them says the same."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def hub_cause(error: BaseException) -> str:
    """Return the first sentence of an error of a library that loads from the hub; the others are its own advice."""
    return cause(error).split(". ")[0].rstrip(".")
