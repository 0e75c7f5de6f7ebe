"""Hooks of the documentation's site: pages at the root of the repository belong to it, and links work in both places.

The pages are written for readers of the repository. On the site, links between pages are those of the site, and links
to other files of the repository become plain text.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FROM_ROOT = {
    "README.md": "index.md",
    "RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
PUBLIC = {
    "kdpipe": "kdpipe/__init__.py",
    "kdpipe.losses": "kdpipe/losses/__init__.py",
    "kdpipe.losses.functional": "kdpipe/losses/functional.py",
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


def on_post_build(config: Any) -> None:
    """Check that the API reference has every public name."""
    page = (Path(config.site_dir) / "api" / "index.html").read_text(encoding="utf-8")
    for module, source in PUBLIC.items():
        tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
        (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and _is_all(node))
        for name in ast.literal_eval(names):
            if not name.startswith("__") and f'id="{module}.{name}"' not in page:
                log.warning("docs/api.md: %s.%s is missing", module, name)


def _is_all(node: ast.Assign) -> bool:
    return isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def _link_on_site(link: re.Match[str], folder: Path) -> str:
    target = (folder / link["path"]).resolve()
    if target.is_relative_to(DOCS) and not target.is_dir():
        site_name = target.relative_to(DOCS).as_posix()
    elif target.is_relative_to(ROOT) and target.exists():
        site_name = FROM_ROOT.get(target.relative_to(ROOT).as_posix(), "")
    else:
        return link[0]  # mkdocs reports it
    return f"[{link['text']}]({site_name}{link['anchor'] or ''})" if site_name else link["text"]
