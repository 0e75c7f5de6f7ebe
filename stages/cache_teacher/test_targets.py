"""Cache the teachers' logits of the test images in a store beside the training store, and evaluate them.

They are needed for the agreement of students with their teacher, and for teacher weights by accuracy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdpipe.stages.cache_teacher.cache import cache_teacher
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.cache_teacher.repair import repair
from kdpipe.stages.context import Setup, test_setup
from kdpipe.stages.models.bundle import Network
from kdpipe.stages.runtime.launcher import WHOLE, Part
from kdpipe.stages.targets.open import test_place
from kdpipe.store.check.verify import VerifyReport


def cache_test(
    config: CacheConfig, path: Path, teacher: Network, setup: Setup, *, part: Part = WHOLE
) -> dict[str, Any]:
    """Cache the logits of the test images of `part` in the test store beside the store at `path`.

    Returns and raises like `cache_teacher`.
    """
    place = Path(test_place(path))
    return cache_teacher(replace(config, top_k=None), place, teacher, [], test_setup(setup), part=part)


def repair_test(
    config: CacheConfig, path: Path, teacher: Network, setup: Setup
) -> tuple[VerifyReport, VerifyReport, int]:
    """Repair the test store at `path`. Returns and raises like `repair`."""
    return repair(replace(config, top_k=None), path, teacher, [], test_setup(setup))
