"""Hooks of the documentation's site: pages at the root of the repository belong to it, and links work in both places.

The pages are written for readers of the repository. On the site, links between pages are those of the site, and links
to other files of the repository become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FROM_ROOT = {
    "README.md": "index.md",
    "RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root of the repository."""
    for name, site_name in FROM_ROOT.items():
        files.append(File.generated(config, site_name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the page's links."""
    folder = ROOT if page.file.src_uri in FROM_ROOT.values() else DOCS
    return LINK.sub(lambda link: _link_on_site(link, folder), markdown)


def _link_on_site(link: re.Match[str], folder: Path) -> str:
    target = (folder / link["path"]).resolve()
    if target.is_relative_to(DOCS) and not target.is_dir():
        site_name = target.relative_to(DOCS).as_posix()
    elif target.is_relative_to(ROOT) and target.exists():
        site_name = FROM_ROOT.get(target.relative_to(ROOT).as_posix(), "")
    else:
        return link[0]  # mkdocs reports it
    return f"[{link['text']}]({site_name}{link['anchor'] or ''})" if site_name else link["text"]
