"""The patch series that adds streaming to SGLang itself: the contents of each patch, and their text.

The core is the overlay's own, with renamed imports and short docstrings. What an SGLang with streaming built in does
in its own way (a load, stock's layers, the switch, GPU tests, documentation) is in `patches/upstream`, with the layout
of SGLang's repository. What changes in SGLang's own files is in `patches/edits` (`edits.py`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_overlay.hooks.built_in import PACKAGE
from workbench.releases.edits import Edit, Read, edited, parsed
from workbench.releases.environment import CLONE

PACKAGE_FOLDER = f"python/{PACKAGE.replace('.', '/')}"
UNIT_TESTS = "test/registered/unit/layers/quantization"
SOURCES = CLONE / "patches" / "upstream"
MESSAGES = CLONE / "patches" / "messages"
EDITS = CLONE / "patches" / "edits"
LINE_LENGTH = 88


@dataclass(frozen=True)
class Patch:
    """One step of the series.

    Attributes:
        number: from 1; by it, `patches/messages` has the commit message, and `patches/edits` may have edits.
        modules: modules of the overlay, by folder and name; in the series they are in one folder.
        files: files that it takes from `patches/upstream`.
    """

    number: int
    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


PATCHES = (
    Patch(
        1,
        modules=("core/capture", "core/errors", "core/placeholders", "core/regions", "core/staging", "core/units"),
        files=(f"{PACKAGE_FOLDER}/__init__.py", f"{UNIT_TESTS}/test_streaming_fp8_capture.py"),
    ),
    Patch(
        2,
        modules=("core/quantizer", "core/stream"),
        files=(f"{UNIT_TESTS}/test_streaming_fp8_stream.py",),
    ),
    Patch(
        3,
        files=(
            f"{PACKAGE_FOLDER}/loading.py",
            f"{PACKAGE_FOLDER}/whole_unit.py",
            "python/sglang/test/kits/streaming_fp8_kit.py",
            "test/registered/quant/test_streaming_fp8_moe.py",
            f"{UNIT_TESTS}/test_streaming_fp8_loading.py",
        ),
    ),
    Patch(4, files=("test/registered/quant/test_streaming_fp8.py",)),
    Patch(5, files=(f"{PACKAGE_FOLDER}/missing.py", f"{UNIT_TESTS}/test_streaming_fp8_missing.py")),
    Patch(6, files=("docs_new/docs/advanced_features/streaming_fp8.mdx",)),
)


def commits(release: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each patch's commit message, and the files it leaves, changed ones only, by their paths in SGLang's repository.

    Args:
        release: folder that contains the release's `sglang` package.

    Raises:
        EditError: an edit does not fit the release.
    """
    formatted = _formatted({path: text for patch in PATCHES for path, text in _added(patch).items()})
    changed: dict[str, str] = {}
    for patch in PATCHES:
        added = {path: formatted[path] for path in _added(patch)}
        changed.update(added)
        edits = edited(reader(release, changed), edits_of(patch.number), patch.number)
        changed.update(edits)
        message = (MESSAGES / f"{patch.number}.txt").read_text(encoding="utf-8")
        yield message, {**added, **edits}


def edits_of(number: int) -> list[Edit]:
    """A patch's edits of SGLang's own files."""
    file = EDITS / f"{number}.diff"
    return parsed(file.read_text(encoding="utf-8"), file.name) if file.exists() else []


def before(release: Path, number: int) -> Read:
    """The release's files, with those of earlier patches, as they are before the patch of this number.

    Raises:
        EditError: an edit of an earlier patch does not fit.
    """
    changed: dict[str, str] = {}
    earlier = PATCHES[: number - 1]
    changed.update(_formatted({path: text for patch in earlier for path, text in _added(patch).items()}))
    for patch in earlier:
        changed.update(edited(reader(release, changed), edits_of(patch.number), patch.number))
    return reader(release, changed)


def reader(release: Path, changed: Mapping[str, str] | None = None) -> Read:
    """Reads the release's own files, by their paths in SGLang's repository; those in `changed` from there."""

    def read(path: str) -> str | None:
        if changed and path in changed:
            return changed[path]
        # The published package is SGLang's folder `python`.
        file = release / Path(path).relative_to("python") if path.startswith("python/") else None
        return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None

    return read


def touched(release: Path) -> dict[str, str]:
    """The release's own files that the series may change, in their original form."""
    edits = (edit for patch in PATCHES for edit in edits_of(patch.number))
    paths = dict.fromkeys(hunk.path for edit in edits for hunk in edit.hunks)
    read = reader(release)
    return {path: text for path in paths if (text := read(path)) is not None}


def _added(patch: Patch) -> dict[str, str]:
    """New files of a patch, before they are formatted in upstream's style."""
    files = {path: _without_licence((SOURCES / path).read_text(encoding="utf-8")) for path in patch.files}
    for module in patch.modules:
        source = Path("sglang_overlay", f"{module}.py")
        files[f"{PACKAGE_FOLDER}/{source.name}"] = _renamed(source)
    return files


def _without_licence(text: str) -> str:
    """Without the line that this project's files begin with, and SGLang's do not."""
    return re.sub(r"\A# SPDX-License-Identifier: .*\n", "", text)


def _renamed(source: Path) -> str:
    """A module of the overlay with imports renamed for the series' package."""
    text = _without_licence((CLONE / source).read_text(encoding="utf-8"))
    text = re.sub(r"\bsglang_overlay\.(core|load|schemes)\b", PACKAGE, text)
    text = re.sub(r"  # (type: ignore|noqa)\b.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *# -- .* -+$", lambda rule: rule[0][:LINE_LENGTH], text, flags=re.MULTILINE)
    left = re.search(r"\bsglang_overlay\b.*", text)
    if left is not None:
        raise ValueError(f"{source} needs what the series does not have: {left[0]}")
    return _with_short_docstrings(text)


def _with_short_docstrings(text: str) -> str:
    """Docstrings without the sections on arguments and the like, which SGLang's style does not have."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        found = body[0] if isinstance(body, list) and body and isinstance(body[0], ast.Expr) else None
        if not isinstance(found, ast.Expr) or not isinstance(found.value, ast.Constant):
            continue
        start, stop = found.lineno - 1, (found.end_lineno or 0) - 1
        section = next((n for n in range(start, stop) if _SECTION.match(lines[n])), None)
        if section is None:
            continue
        kept = section
        while not lines[kept - 1].strip():
            kept -= 1
        lines[kept:stop] = [""] * (stop - kept)
        if kept == start + 1:
            lines[start], lines[stop] = lines[start] + '"""', ""
    return re.sub(r"(?<!\n)\n{2,}( *\"\"\"\n)", r"\n\1", "\n".join(lines) + "\n")


_SECTION = re.compile(r" *(Args|Attributes|Raises|Returns):")


def _formatted(files: Mapping[str, str]) -> dict[str, str]:
    """Files formatted in upstream's style: black's layout and isort's order."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        style = ["--isolated", "--quiet", "--no-cache"]
        first_party = 'lint.isort.known-first-party=["sglang"]'
        _ruff("check", *style, "--select", "I", "--fix", "--config", first_party, folder)
        _ruff("format", *style, "--line-length", str(LINE_LENGTH), folder)
        return {path: Path(folder, path).read_text(encoding="utf-8") for path in files}


def _ruff(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ruff", *arguments], check=True)
