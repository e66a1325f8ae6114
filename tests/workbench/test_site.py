"""Links of pages that are written for a clone, in the site."""

from __future__ import annotations

import pytest
from workbench.docs import site


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("schemes.md#writing-a-scheme", "docs/export.md", "export.md", "schemes.md#writing-a-scheme"),
        ("docs/schemes.md#x", "CONTRIBUTING.md", "contributing.md", "schemes.md#x"),
        ("../CONTRIBUTING.md", "docs/adding.md", "adding.md", "contributing.md"),
        ("../../SECURITY.md", "docs/api/core.md", "api/core.md", "../security.md"),
        ("../setup.py", "docs/adding.md", "adding.md", "files/setup.py"),
        ("../nowhere.md", "docs/adding.md", "adding.md", "../nowhere.md"),
        ("https://example.org/docs/x.md", "CONTRIBUTING.md", "contributing.md", "https://example.org/docs/x.md"),
    ],
)
def test_link_leads_to_where_the_file_is_in_the_site(link: str, source: str, page: str, expected: str) -> None:
    assert site.rewritten(f"see [it]({link}).", source, page) == f"see [it]({expected})."


def test_files_that_are_no_pages_are_published() -> None:
    markdown = "[a](../sglang_overlay/offline/plan/gpus.json) [b](plans.md) [c](../CONTRIBUTING.md) [d](../nowhere)"
    assert site.outside(markdown, "docs/planner.md") == ["sglang_overlay/offline/plan/gpus.json"]


def test_pages_at_the_top_are_there() -> None:
    assert [name for name in site.TOP_PAGES if not (site.CLONE / name).is_file()] == []
