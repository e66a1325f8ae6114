# SPDX-License-Identifier: Apache-2.0
"""A wheel with part of its files left out. Standard library only."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path


def trimmed(wheel: Path, keep: Callable[[str], bool], build: str) -> Path:
    """Write a wheel beside ``wheel`` with its metadata and those files of which ``keep`` is true, and remove ``wheel``.

    Args:
        wheel: ``name-version-python-abi-platform.whl``.
        keep: is asked of each file's name in the wheel.
        build: tag for the new wheel's name, so that nobody takes it for the published one. Begins with a digit.
    """
    name, version, *tags = wheel.stem.split("-")
    target = wheel.with_name("-".join([name, version, build, *tags]) + ".whl")
    information = f"{name}-{version}.dist-info/"
    record = f"{information}RECORD"
    rows: list[tuple[str, str, int | str]] = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            if entry.is_dir() or entry.filename == record or not (_is_in(information, entry) or keep(entry.filename)):
                continue
            content = source.read(entry)
            if entry.filename == f"{information}WHEEL":
                content = content.rstrip(b"\n") + f"\nBuild: {build}\n".encode()
            out.writestr(entry, content, zipfile.ZIP_DEFLATED)
            rows.append((entry.filename, f"sha256={_digest(content)}", len(content)))
        out.writestr(record, _table([*rows, (record, "", "")]))
    wheel.unlink()
    return target


def _is_in(folder: str, entry: zipfile.ZipInfo) -> bool:
    return entry.filename.startswith(folder)


def _digest(content: bytes) -> str:
    """As RECORD has it: URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _table(rows: list[tuple[str, str, int | str]]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()
