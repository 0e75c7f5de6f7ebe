"""`kdpipe views`: samples by views in one picture, the teacher's likeliest classes under each."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.terminal.output import printable
from stages.errors import RecipeError
from stages.show_views import NUM_TOP, ShownViews
from store import write_atomically

CELL, GAP, LINE, MARGIN = 128, 8, 12, 96
"""Pixels: the side of a picture, the room between two, a line of text, the column of labels."""

MOST_LETTERS = 22


def draw_grid(shown: ShownViews, path: Path) -> None:
    """Write the grid to `path`, a row a sample, a column a view. Raises RecipeError for a name that is no PNG's, and
    OSError where it cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise RecipeError(f"--save {path}: the picture is a PNG; end its name with .png.")
    num_samples, num_views = shown.images.shape[:2]
    height = CELL + (NUM_TOP + 1) * LINE + GAP
    canvas = Image.new("RGB", (MARGIN + num_views * (CELL + GAP), 2 * LINE + num_samples * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for view in range(num_views):
        draw.text((MARGIN + view * (CELL + GAP), GAP // 2), f"view {view}", "black", font)
    for row in range(num_samples):
        top = 2 * LINE + row * height
        draw.text((GAP, top), _short(shown.labels[row], 14), "black", font)
        draw.text((GAP, top + LINE), _short(str(shown.sample_ids[row]), 14), "grey", font)
        for view in range(num_views):
            left = MARGIN + view * (CELL + GAP)
            canvas.paste(_cell(shown.images[row, view]), (left, top))
            if (partner := shown.partners[row][view]) is not None:
                text = f"with {100 * partner[1]:.0f} % {_short(partner[0], MOST_LETTERS - 11)}"
                draw.text((left, top + CELL + NUM_TOP * LINE), text, "grey", font)
            for line, (name, share) in enumerate(shown.top[row][view]):
                colour = "green" if name == shown.labels[row] else "black"
                text = f"{_short(name, MOST_LETTERS - 6)} {100 * share:.0f} %"
                draw.text((left, top + CELL + line * LINE), text, colour, font)
    picture = BytesIO()
    canvas.save(picture, format="PNG")
    write_atomically(path, picture.getvalue())


def _cell(image: Tensor) -> Image.Image:
    """One picture, uint8 [C, H, W], as large as a cell allows; of small ones each pixel is to be seen."""
    pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    drawn = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).convert("RGB")
    longest = max(drawn.size)
    pixels_show = longest <= CELL // 3
    factor = CELL // longest if pixels_show else CELL / longest
    width, height = (max(1, round(side * factor)) for side in drawn.size)
    return drawn.resize((width, height), Image.Resampling.NEAREST if pixels_show else Image.Resampling.BILINEAR)


def _short(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}."
