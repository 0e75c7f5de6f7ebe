"""Code blocks of the documentation's pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from support.paths import ROOT

ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "RESULTS.md", "CHANGELOG.md", "SECURITY.md")
SETUP = re.compile(r"<!-- setup\n(?P<code>.*)-->", re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]+) -->")
TITLE = re.compile(r'title="(?P<title>[^"]+)"')


def pages() -> list[Path]:
    """All pages of the documentation."""
    return [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").glob("**/*.md"))]


@dataclass(frozen=True)
class Block:
    """A block of code in a page.

    Attributes:
        language: As written after the fence; "setup" for the code of a comment `<!-- setup ... -->`, which no reader
            sees; empty for indented blocks.
        title: Name of the file that the block shows, from `title="NAME"`.
        line: Number of its first line.
        not_run: The reason in a comment `<!-- not run: REASON -->` before the block.
    """

    page: Path
    language: str
    code: str
    line: int
    title: str | None = None
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def code_blocks(page: Path) -> list[Block]:
    """All code blocks of a page, those in lists included."""
    blocks, reason = [], None
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            if found := SETUP.match(token.content):
                blocks.append(Block(page, "setup", found["code"], line + 1))
            reason = found["reason"] if (found := NOT_RUN.match(token.content)) else None
        elif token.type in ("fence", "code_block"):
            language, title = token.info.partition(" ")[0], TITLE.search(token.info)
            first = line + (token.type == "fence")
            blocks.append(Block(page, language, token.content, first, title["title"] if title else None, reason))
            reason = None
        elif not token.type.endswith("_close"):
            reason = None
    return blocks
