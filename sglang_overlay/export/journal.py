# SPDX-License-Identifier: Apache-2.0
"""An export that is under way: whose folder it is, what is in it already, and when it is finished.

The folder holds the journal from its first moment to the last. Files appear complete or not at all, ``config.json``
last: without it neither SGLang nor transformers takes a folder for a model.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_overlay.errors import ExportError
from sglang_overlay.export.weight_file import appearing, sync_folder

JOURNAL = ".streamfp8-export.json"


@contextmanager
def begun(folder: Path, described: Mapping[str, Any]) -> Iterator[None]:
    """Hold a folder for an export; on leaving without an error the export is finished.

    Args:
        folder: made if missing; may hold what an earlier, interrupted export of the same has left.
        described: everything that decides what is written, as JSON data.

    Raises:
        ExportError: the folder has other contents, or somebody else is at it.
        OSError: it cannot be written to, or its file system has no locks.
    """
    journal = folder / JOURNAL
    check_free_for(folder, described)
    folder.mkdir(parents=True, exist_ok=True)
    if not journal.exists():
        with appearing(journal) as file:
            file.write(_text(described).encode())
    with journal.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"another export is writing to {folder}") from None
        yield
    journal.unlink()
    sync_folder(folder)


def check_free_for(folder: Path, described: Mapping[str, Any]) -> None:
    """Make sure that an export may be written to ``folder``.

    Raises:
        ExportError: it has other contents, or is no folder.
    """
    journal = folder / JOURNAL
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is no folder")
    if journal.is_file():
        if journal.read_text(encoding="utf-8") != _text(described):
            raise ExportError(
                f"{folder} holds an unfinished export of something else: another checkpoint, a checkpoint that has "
                "changed since, or another scheme. Remove it, or choose another folder."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ExportError(f"{folder} exists and is not empty; an export overwrites nothing. Choose another folder.")


def _text(described: Mapping[str, Any]) -> str:
    return json.dumps(described, indent=1, sort_keys=True) + "\n"
