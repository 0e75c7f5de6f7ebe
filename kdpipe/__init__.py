"""Offline knowledge distillation: cache a teacher's outputs once, train students from the cache.

`kdpipe.store` holds target stores, `kdpipe.stages` what the stages compute, `kdpipe.pipeline` the command line.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kdpipe")
except PackageNotFoundError:  # a checkout that is on PYTHONPATH without being installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
