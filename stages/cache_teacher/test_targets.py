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
from kdpipe.stages.context import StageContext, test_context
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.launcher import ALL, WorkShard
from kdpipe.stages.targets.open import test_store_path
from kdpipe.store.check.verify import VerifyReport


def cache_test_store(
    config: CacheConfig, path: Path, teacher: ModelBundle, context: StageContext, *, part: WorkShard = ALL
) -> dict[str, Any]:
    """Cache the logits of the test images of `part` in the test store beside the store at `path`.

    Returns and raises like `cache_teacher`.
    """
    place = Path(test_store_path(path))
    return cache_teacher(replace(config, top_k=None), place, teacher, [], test_context(context), part=part)


def repair_test_store(
    config: CacheConfig, path: Path, teacher: ModelBundle, context: StageContext
) -> tuple[VerifyReport, VerifyReport, int]:
    """Repair the test store at `path`. Returns and raises like `repair`."""
    return repair(replace(config, top_k=None), path, teacher, test_context(context))
