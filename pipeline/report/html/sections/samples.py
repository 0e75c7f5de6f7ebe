"""The section of pictures: each with what teacher and students take it for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.page.heat import percent
from pipeline.page.markup import Html, LeftOutError, element, join, note, safe, short
from pipeline.page.opinions import NUM_LOOKED_AT, Said, Shown, ask_test, open_walk, students_of, telling, views_shown
from pipeline.page.read import PageRun
from store import KdpipeError

VIEWS = (
    f"The first sample is as it comes, the next are those of {NUM_LOOKED_AT} of whose views the teacher is least sure. "
    "In bold: the label."
)

SIDE = 128
"""Pixels to which larger pictures are made smaller."""

SMALL_SIDE = 48
"""Of pictures no larger, each pixel is to be seen."""


def samples(run: PageRun) -> Html:
    """The section. Raises LeftOutError where the pictures cannot be read."""
    try:
        walk, students = open_walk(run), students_of(run)
        if not students:
            raise LeftOutError("There is no finished student yet to be asked.")
        views = views_shown(walk, students)
        num_macs = sum(int((one.result or {}).get("num_macs") or 0) for net in run.main[1:] for one in net.done[:1])
        asked = ask_test(walk, students, num_macs)
        groups = telling(walk, asked)
    except (KdpipeError, OSError) as error:
        raise LeftOutError(f"The pictures could not be shown: {error}") from error
    told = f"Below: some of the first {len(asked.labels):,} test images. The students are those of the first seed."
    return join(
        [
            element("p", "Training samples in the views that were cached", kind="group"),
            note(VIEWS),
            *map(_cards, views),
            note(told),
            *(join([element("p", title, kind="group"), _cards(shown)]) for title, shown in groups),
        ]
    )


def _cards(shown: Sequence[Shown]) -> Html:
    return element("div", *map(_card, shown), kind="cards")


def _card(one: Shown) -> Html:
    picture = element("div", _picture(one), element("div", element("b", one.label), one.about, kind="what"))
    said = join(_opinion(name, said, one.label) for name, said in one.opinions.items())
    return element("div", picture, element("dl", said, kind="said"), kind="card")


def _opinion(name: str, said: Said, label: str) -> Html:
    """A network's likeliest classes, a bar behind each; the right one is marked."""
    hit = bool(said) and said[0][0] == label
    lines = [
        element(
            "dd",
            element("span", short(given, 26)),
            element("span", percent(share)),
            kind="hit" if given == label else "miss",
            style=f"--share:{100 * share:.0f}%",
        )
        for given, share in said
    ]
    return join(
        [element("dt", f"{name} ", element("span", "✓" if hit else "✗", kind="mark" if hit else "mark no")), *lines]
    )


def _picture(one: Shown) -> Html:
    data, is_small = png(one.image)
    kind = ' class="small"' if is_small else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Html(f'<img{kind} src="{source}" alt="{safe(f"{one.label}, {one.about}")}" loading="lazy">')


def png(image: Tensor) -> tuple[bytes, bool]:
    """A picture, uint8 [C, H, W], as a PNG file of at most SIDE pixels; and whether it is a small one."""
    pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    drawn = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    is_small = max(drawn.size) <= SMALL_SIDE
    drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    drawn.save(file, format="PNG", optimize=True)
    return file.getvalue(), is_small
