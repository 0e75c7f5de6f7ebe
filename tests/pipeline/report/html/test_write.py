"""The size of the page."""

from __future__ import annotations

from typing import Any

from kdpipe.pipeline.report.html.write import FIRST_LEFT_OUT, MAX_BYTES, SECTIONS, _fitted


def test_a_page_of_many_runs_leaves_pictures_out() -> None:
    size = 1600  # of each section: 50 runs with all of them have a million, with their results more

    def part() -> dict[str, Any]:
        sections = [{"key": section.key, "title": section.title, "body": "x" * size} for section in SECTIONS]
        return {"sections": sections}

    parts, messages = [part() for _ in range(50)], []

    def draw() -> str:
        return "h" * 60_000 + "".join(section["body"] for one in parts for section in one["sections"])

    assert len(draw()) > MAX_BYTES
    text = _fitted(parts, draw, messages.append)
    assert len(text) <= MAX_BYTES
    bodies = {section["key"]: section["body"] for section in parts[7]["sections"]}
    assert "more than 1 MB" in bodies["samples"] and bodies["curves"] == bodies["results"] == "x" * size
    assert messages == ["Test images with predictions: left out, the page would have more than 1 MB."]
    assert set(FIRST_LEFT_OUT) == {section.key for section in SECTIONS} - {"results"}
