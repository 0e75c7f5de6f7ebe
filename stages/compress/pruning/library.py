"""Import torch-pruning without timm."""

from __future__ import annotations

import sys
from typing import Any


def import_torch_pruning() -> Any:
    """Return torch-pruning; timm, which takes a second and which it uses only to count operations, is not imported."""
    hidden = "timm" not in sys.modules
    if hidden:
        sys.modules["timm"] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        import torch_pruning
    finally:
        if hidden:
            del sys.modules["timm"]
    return torch_pruning
