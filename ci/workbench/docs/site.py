"""Add files from outside of `docs/` to the documentation site; mkdocs calls this (`hooks` in mkdocs.yml).

Markdown is written to be read in a clone: pages link to files of the repository, and some pages are at its top. The
site includes those pages, and publishes linked files beside them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

CLONE = Path(__file__).resolve().parents[3]
TOP_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Pages at the top of the repository, and their names in the site."""
PUBLISHED = "files"
"""The site's folder for linked files."""
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the top of the repository, and the files that any page links to."""
    from mkdocs.structure.files import File

    for source, target in TOP_PAGES.items():
        files.append(File.generated(config, target, content=(CLONE / source).read_text(encoding="utf-8")))
    linked = {
        path for file in files.documentation_pages() for path in outside(file.content_string, place(file.src_uri))
    }
    for path in sorted(linked):
        files.append(File.generated(config, f"{PUBLISHED}/{path}", abs_src_path=str(CLONE / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between files of the site."""
    return rewritten(markdown, place(page.file.src_uri), page.file.src_uri)


def place(page: str) -> str:
    """The path in the repository of a page of the site."""
    return {target: source for source, target in TOP_PAGES.items()}.get(page, f"docs/{page}")


def outside(markdown: str, source: str) -> list[str]:
    """Files of the repository that a page links to and that are not part of the site otherwise."""
    found = (resolved(link, source) for _, link, _ in _LINK.findall(markdown))
    return [
        path for path in found if not path.startswith("docs/") and path not in TOP_PAGES and (CLONE / path).is_file()
    ]


def rewritten(markdown: str, source: str, page: str) -> str:
    """A page with its links changed to the site's paths.

    Args:
        markdown: the page as in the repository.
        source: path of the page there.
        page: its path in the site's sources.
    """

    def moved(link: re.Match[str]) -> str:
        path = resolved(link[2], source)
        if path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif (CLONE / path).is_file():
            target = TOP_PAGES.get(path, f"{PUBLISHED}/{path}")
        else:
            return link[0]
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{link[3]}"

    return _LINK.sub(moved, markdown)


def resolved(link: str, source: str) -> str:
    """The path in the repository that a link in ``source`` points to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
