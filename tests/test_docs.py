# SPDX-License-Identifier: Apache-2.0
"""What documentation names is there: links, files, folders, and the tests that are said to hold something."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "patches" / "README.md"]
SOURCES = ("", "sglang_overlay", "tests", "tests/load", "tests/update", "tests/hooks", "tests/schemes", "ci")
"""Where a path in a page may begin. What docs/patches.md says of SGLang's tree is under python/ or test/."""

LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FOLDERS = {file.parent.name for place in ("sglang_overlay", "tests") for file in (ROOT / place).glob("*/*.py")}
OURS = re.compile(rf"(?:(?:sglang_overlay|tests|docs|{'|'.join(sorted(FOLDERS))})/|ci/workbench/)[\w/.]+")
PICTURED = re.compile(r"[a-z_]+/\w+\.py")
TEST = re.compile(r"((?:\w+/)*test_\w+\.py)?((?:::\w+…?)+)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def spans(page: Path) -> list[str]:
    """Everything in backticks."""
    return CODE.findall(page.read_text(encoding="utf-8"))


@cache
def python_files() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/**/*.py"))}


def is_defined(name: str, texts: list[str]) -> bool:
    """Whether a function or class of that name is there; ``…`` at its end stands for anything."""
    end = r"\w*" if name.endswith("…") else ""
    return any(re.search(rf"\b(def|class) {name.rstrip('…')}{end}\b", text) for text in texts)


def resolve(path: str) -> list[Path]:
    return [found for source in SOURCES if (found := ROOT / source / path.rstrip("/")).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page):
    named = [span for span in spans(page) if OURS.fullmatch(span.partition("::")[0])]
    assert [span for span in named if not resolve(span.partition("::")[0])] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_are_there(page):
    missing = []
    for span in spans(page):
        match = TEST.fullmatch(span)
        if match is None or "test_" not in span:
            continue
        texts = [python_files()[path] for path in resolve(match[1])] if match[1] else list(python_files().values())
        names = match[2].split("::")[1:]
        missing += [span] if not all(is_defined(name, texts) for name in names) else []
    assert missing == []


def test_messages_that_are_explained_are_those_of_the_code():
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("sglang_overlay/**/*.py")))
    # A message over several lines is one.
    text = re.sub(r'"\n\s*f?"', "", sources)
    rows = re.findall(
        r"^\| `([^`]+)` \|", (ROOT / "docs/questions/messages.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 15
    assert [row for row in rows if row not in text] == []


def test_every_trap_names_a_test():
    """docs/how-it-works.md has a table of traps, each with what holds it."""
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 17
    assert [number for number, row in rows if "test_" not in row.rsplit("|", 1)[-1]] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/adding.md"])
def test_names_in_code_are_those_of_the_code(page):
    """Where to add something is said by constants, classes and functions; they exist under these names."""
    wanted = {
        "BUILT_IN",
        "STREAMED_LOADERS",
        "ABSORBED",
        "Place",
        "Hook",
        "SerializedPlan",
        "PATCHED_MODULES",
        "STREAMING",
        "TELLING",
        "elsewhere",
        "without",
        "why_not_schemes",
    }
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("sglang_overlay/**/*.py"))
    named = wanted.intersection(spans(ROOT / page))
    assert named
    definition = r"^\s*((class|def) {0}\b|{0}\b.*[:=])"
    assert [name for name in named if not re.search(definition.format(name), code, re.MULTILINE)] == []


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/**/*.svg")), ids=name_of)
def test_files_that_a_picture_names_are_there(picture):
    named = PICTURED.findall(picture.read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not resolve(name)] == []
