"""What all exporters need: a model's export form, and silence."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from kdpipe.stages.models.clone import clone_without_hooks


@runtime_checkable
class Exportable(Protocol):
    """A model or layer that is exported in another form than the one it is trained in."""

    def for_export(self) -> nn.Module:
        """Return a module for the CPU that computes the same and can be exported; `self` stays unchanged."""
        ...


@runtime_checkable
class OnnxFile(Protocol):
    """A model that is an ONNX file, with the inputs and outputs of exported ones."""

    def onnx_file(self) -> bytes:
        """Return the file."""
        ...


def export_form(model: nn.Module) -> nn.Module:
    """Return a copy of `model`, on the CPU in eval mode, with every `Exportable` part in its export form."""
    if isinstance(model, Exportable):
        return model.for_export()
    copy = clone_without_hooks(model).cpu().eval()
    replace_modules(copy, {part: part.for_export().eval() for part in copy.modules() if isinstance(part, Exportable)})
    return copy


def replace_modules(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules of `model` in place, at every path of a shared one."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in successors:
            model.set_submodule(path, successors[module])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress output, warnings and log lines of torch's exporters; errors carry what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
