"""mkdocs: pages link to files of the repository as they lie there; on the site those files come along.

So a page reads the same in the repository and on the site, and a link to a file that has gone fails the strict build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# pages of the site that lie outside docs/
PAGES = {
    "README.md": "readme.md",
    "benchmarks/README.md": "figures.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside, and every file that a page links to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(page.content_string):
            source = _source(target, page.src_uri)
            if not (ROOT / source).is_file() or source.startswith("docs/") or source in PAGES:
                continue
            if files.get_file_from_path(_place(source)) is None:
                files.append(File.generated(config, _place(source), abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links point to where those files are on the site."""
    start = posixpath.dirname(page.file.src_uri) or "."

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(_place(_source(link[1], page.file.src_uri)), start)

    return _LINK.sub(moved, markdown)


def _source(target: str, page: str) -> str:
    """What a page's link names, from the root of the repository."""
    home = next((source for source, place in PAGES.items() if place == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), target))


def _place(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source in PAGES:
        return PAGES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"repository/{source}"
