"""Advise on the encoding of a teacher's logits, from the rows of a store or the teacher of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe.pipeline.recipe.load import all_losses
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.shared_store import find_teacher
from kdpipe.pipeline.terminal.output import console
from kdpipe.pipeline.terminal.tables import Table, print_table
from kdpipe.stages.cache_teacher.estimate import first_logits, first_outputs
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.data.image_set import require_classes
from kdpipe.stages.distillation.encoding_advice import (
    EncodingReport,
    compare_encodings,
    num_compared,
    recommended,
    report_head,
)
from kdpipe.stages.errors import ModelError, RunError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.head import linear_head
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import StoreError, TargetStore, open_store

DEFAULT_LOSSES: list[tuple[str, Loss]] = [("kd at T = 1", KD(temperature=1.0)), ("kd at T = 4", KD(temperature=4.0))]
"""The losses of a store without a recipe."""


def advise_store(path: Path) -> list[EncodingReport]:
    """Compare encodings on rows of the first view of a store, for KD at T = 1 and 4."""
    store = open_store(path)
    return compare_encodings(_stored_logits(store), DEFAULT_LOSSES, int(store.manifest.identity.views.get("seed", 0)))


def advise_run(run: Run) -> list[EncodingReport]:
    """Compare encodings for the losses of a recipe: on its store if that has all logits, else on the teacher's outputs.

    Raises:
        RunError: There is neither.
        RecipeError: The outputs are not of classes.
    """
    require_classes(run.context.train_set, "store advise")
    own = run.stores.index(run.store) if run.store in run.stores else 0
    losses = [
        (f"{where}.{number} ({loss.loss})", loss)
        for where, some in all_losses(run.recipe).items()
        for number, loss in enumerate(some)
        if loss.on_logits and loss.store in (None, own)
    ]
    losses = losses or DEFAULT_LOSSES
    found = find_teacher(run)
    reports = compare_encodings(_logits_of(run, found), losses, run.context.views.seed)
    return reports if found is None else [*reports, *_head_reports(run, found, losses)]


def _head_reports(run: Run, found: Path, losses: Sequence[tuple[str, Loss]]) -> list[EncodingReport]:
    """Return the report of the head encoding, if the teacher ends in one linear layer, on its first batch."""
    teacher = load_teacher(run.recipe.teacher, run.recipe.seed, replace(run.context, run_dir=found))
    try:
        head = linear_head(teacher.model, run.context.image_shape)
    except ModelError:
        return []
    logits, vectors = first_outputs(_first_batch(run), teacher, run.context, [PRE_LOGITS])
    return [report_head(logits, vectors, head, losses)]


def _logits_of(run: Run, found: Path | None) -> NDArray[np.float32]:
    try:
        return _stored_logits(open_store(run.store))
    except StoreError as error:
        if found is None:
            raise RunError(
                "there is neither a store with all logits nor a trained teacher: run `kdpipe train-teacher` first."
            ) from error
    teacher = load_teacher(run.recipe.teacher, run.recipe.seed, replace(run.context, run_dir=found))
    return first_logits(_first_batch(run), teacher, run.context)


def _first_batch(run: Run) -> CacheConfig:
    return replace(run.recipe.cache, batch_size=min(256, num_compared(run.context.train_set.num_classes)))


def _stored_logits(store: TargetStore) -> NDArray[np.float32]:
    """Return logits [n, C] of the first rows, which are in a pseudorandom order, or raise StoreError."""
    manifest = store.manifest
    if not manifest.has_logits or manifest.task != "classification":
        raise StoreError(f"{store.path} has no logits of classes, so that they have no encoding to choose.")
    if manifest.encoding and not manifest.encoding.all_logits:
        raise StoreError(
            f"{store.path} has {manifest.encoding.describe()}: give a store of dense logits, or the recipe, to compare."
        )
    return store.logits(0, store.samples.ids[: num_compared(store.num_classes)])


def print_advice(reports: Sequence[EncodingReport], max_kl: float) -> None:
    """Print the table of encodings and the recommendation."""
    temperatures = list(reports[0].kl)
    headers = ["encoding", "bytes a row", *(f"KL, T = {t}" for t in temperatures), "top-1 flips"]
    headers += [*(f"gradient, T = {t}" for t in temperatures), "rows/s", "losses"]
    rows = [
        [
            one.name,
            f"{one.row_bytes:,}",
            *(f"{one.kl[t]:.1e}" if t in one.kl else "-" for t in temperatures),
            f"{100 * one.flips:.2f} %",
            *(f"{one.gradient_cosine[t]:.4f}" if t in one.gradient_cosine else "-" for t in temperatures),
            f"{one.rows_per_s:,.0f}",
            "no" if one.refusal else "yes",
        ]
        for one in reports
    ]
    out, chosen = console(), recommended(reports, max_kl)
    print_table(out, Table("", headers, rows))
    for refusal in dict.fromkeys(one.refusal for one in reports if one.refusal):
        out.print(f"no: {refusal}", markup=False, soft_wrap=True)
    fits = (
        f"within {max_kl:g} nats" if chosen.max_kl() <= max_kl else f"none is within {max_kl:g} nats, this is nearest"
    )
    out.print(
        f"Recommended: {chosen.name}, {chosen.row_bytes:,} bytes a row ({fits}): {chosen.key}.",
        markup=False,
        soft_wrap=True,
    )
