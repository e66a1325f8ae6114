# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown. Generated tables in pages are between two comments, the first of which names the command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_END = "<!-- its end -->\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as Markdown. Columns whose heading ends in a colon are numbers, aligned to the right."""
    rules = ["---:" if heading.endswith(":") else "---" for heading in header]
    lines = [[heading.removesuffix(":") for heading in header], rules, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(page: str, command: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The page with the command's table replaced by ``markdown(header, rows)``.

    Raises:
        ValueError: the page has no place for it.
    """
    marker = f"<!-- {command} writes this table -->\n"
    if page.count(marker) != 1:
        raise ValueError(f"the page has no one place for what {command} writes: {marker.strip()}")
    begin = page.index(marker) + len(marker)
    end = page.index(_END, begin)
    return f"{page[:begin]}\n{markdown(header, rows)}\n{page[end:]}"
