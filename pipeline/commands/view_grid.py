"""Draw the image of `kdpipe views`: a grid of samples by views with the teacher's top classes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kdpipe.pipeline.run import Run
from kdpipe.pipeline.terminal.output import printable
from kdpipe.stages.cache_teacher.preview import NUM_TOP, ViewPreview, show_views
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.targets.open import local_store_path, open_with_views
from kdpipe.store import is_url, read_store_manifest, write_atomically

CELL, GAP, LINE, MARGIN = 128, 8, 12, 96
"""Pixels: side of an image, gap between images, height of a text line, width of the label column."""

MAX_LETTERS = 22


def draw_grid(shown: ViewPreview, path: Path) -> None:
    """Write the grid to `path`: one row for each sample, one column for each view.

    Raises:
        RecipeError: `path` does not end in .png.
        OSError: The file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise RecipeError(f"--save {path}: only PNG is supported; use a name that ends in .png.")
    num_samples, num_views = shown.images.shape[:2]
    height = CELL + (NUM_TOP + 1) * LINE + GAP
    canvas = Image.new("RGB", (MARGIN + num_views * (CELL + GAP), 2 * LINE + num_samples * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for view in range(num_views):
        draw.text((MARGIN + view * (CELL + GAP), GAP // 2), _short(shown.views[view], MAX_LETTERS), "black", font)
    for row in range(num_samples):
        top = 2 * LINE + row * height
        draw.text((GAP, top), _short(shown.labels[row], 14), "black", font)
        draw.text((GAP, top + LINE), _short(str(shown.sample_ids[row]), 14), "grey", font)
        for view in range(num_views):
            left = MARGIN + view * (CELL + GAP)
            canvas.paste(_cell(shown.images[row, view]), (left, top))
            if (partner := shown.partners[row][view]) is not None:
                text = f"with {100 * partner[1]:.0f} % {_short(partner[0], MAX_LETTERS - 11)}"
                draw.text((left, top + CELL + NUM_TOP * LINE), text, "grey", font)
            for line, (name, share) in enumerate(shown.top[row][view]):
                color = "green" if name == shown.labels[row] else "black"
                text = f"{_short(name, MAX_LETTERS - 6)} {100 * share:.0f} %"
                draw.text((left, top + CELL + line * LINE), text, color, font)
    file = BytesIO()
    canvas.save(file, format="PNG")
    write_atomically(path, file.getvalue())


def _cell(image: Tensor) -> Image.Image:
    """Scale an image, uint8 [C, H, W], to fit a cell; small ones by a whole factor, so that pixels are visible."""
    pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    drawn = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).convert("RGB")
    longest = max(drawn.size)
    is_small = longest <= CELL // 3
    factor = CELL // longest if is_small else CELL / longest
    width, height = (max(1, round(side * factor)) for side in drawn.size)
    return drawn.resize((width, height), Image.Resampling.NEAREST if is_small else Image.Resampling.BILINEAR)


def _short(text: str, max_letters: int) -> str:
    text = printable(text)
    return text if len(text) <= max_letters else f"{text[: max_letters - 1]}."


def run_views(run: Run, num_samples: int, num_views: int) -> tuple[ViewPreview, str | None]:
    """Return some samples in their first views, with the predictions in the first store, and that store's path."""
    place = run.stores[0]
    if not is_url(place) and (not Path(place).exists() or read_store_manifest(Path(place)).finished is None):
        return show_views(run.context, None, num_samples, num_views), None
    store = open_with_views(local_store_path(place, run.monitor), run.context.view_identity(), {})
    return show_views(run.context, store, num_samples, num_views), str(place)
