"""Tests of the exporters themselves: nothing is taken from earlier exports."""

import pytest

from kdpipe.stages.export import onnx_export, torch_export


@pytest.fixture(autouse=True)
def _exported_anew(monkeypatch):
    for module, name in ((onnx_export, "_to_onnx"), (torch_export, "_exported")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, getattr(function, "__wrapped__", function))
