"""Protocols that let a prepared model define its own export form, without export code knowing quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import onnx
from torch import Tensor, nn

from kdpipe.stages.models.clone import clone_without_hooks


@runtime_checkable
class Exportable(Protocol):
    """A model or layer that is exported in another form than the one it is trained in."""

    def for_export(self) -> nn.Module:
        """Return a module for the CPU that computes the same and can be exported; `self` stays unchanged."""
        ...


@runtime_checkable
class Diagnosable(Protocol):
    """A model that compares its values with those of its ONNX file itself."""

    def first_divergence(self, proto: onnx.ModelProto, images: Tensor) -> str:
        """Return a clause that names the first operation whose values differ on `images` [B, C, H, W]."""
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
