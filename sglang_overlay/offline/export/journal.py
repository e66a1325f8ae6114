# SPDX-License-Identifier: Apache-2.0
"""The journal of a running export: who owns the folder, what is in it already, and when the export is finished.

The folder contains the journal from beginning to end of the export, and the process that has locked the journal owns
the folder. The journal is complete on disk before anything else is written, so a truncated one means that the export
had not begun. All other files appear complete or not at all, ``config.json`` last: without it neither SGLang nor
transformers recognizes the folder as a model.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from sglang_overlay.errors import ExportError
from sglang_overlay.offline.export.weight_file import sync_folder

JOURNAL = ".streamfp8-export.json"


@contextmanager
def begun(folder: Path, described: Mapping[str, Any]) -> Iterator[None]:
    """Own a folder for an export; leaving the block without an error finishes the export.

    Args:
        folder: created if missing; may hold files of an earlier, interrupted run of the same export.
        described: everything that decides what is written, as JSON data.

    Raises:
        ExportError: the folder has other contents, or another process is exporting to it.
        OSError: it cannot be written to, or its file system has no locks.
    """
    journal = folder / JOURNAL
    # Decided before the folder is checked, so that no journal is begun if another process finishes meanwhile.
    mode = "r+b" if journal.exists() else "x+b"
    check_free_for(folder, described)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(journal, mode) as file:
        # The previous owner may have changed it.
        if check_free_for(folder, described) is None:
            _write(file, _text(described))
            sync_folder(folder)
        yield
        journal.unlink()
        sync_folder(folder)


def check_free(folder: Path) -> str | None:
    """Make sure that an export, whichever it is, may be written to ``folder``.

    Returns:
        The journal's text if there is an unfinished export, else None.

    Raises:
        ExportError: the folder has contents other than an unfinished export, or is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is no folder")
    found = _read(folder / JOURNAL)
    if found is None and folder.is_dir() and any(path.name != JOURNAL for path in folder.iterdir()):
        raise ExportError(f"{folder} exists and is not empty; an export overwrites nothing. Choose another folder.")
    return found


def check_free_for(folder: Path, described: Mapping[str, Any]) -> str | None:
    """Make sure that this export may be written to ``folder``.

    Returns:
        As ``check_free``.

    Raises:
        ExportError: as ``check_free``, or a different export is unfinished there.
    """
    found = check_free(folder)
    if found not in (None, _text(described)):
        raise ExportError(
            f"{folder} holds an unfinished export of something else: another checkpoint, a checkpoint that has "
            "changed since, or another scheme. Remove it, or choose another folder."
        )
    return found


@contextmanager
def _locked(journal: Path, mode: str) -> Iterator[IO[bytes]]:
    """Open and lock a journal exclusively. Opened for writing, which NFS requires for an exclusive lock."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(journal.open(mode))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock is worthless if another process has finished the export and removed the file since.
            is_held = os.path.samestat(os.fstat(file.fileno()), journal.stat())
        except (BlockingIOError, FileExistsError, FileNotFoundError):
            is_held = False
        if not is_held:
            raise ExportError(f"another export is writing to {journal.parent}")
        yield file


def _read(journal: Path) -> str | None:
    """A journal's text; None if there is none, or if it is truncated."""
    try:
        found = journal.read_text(encoding="utf-8")
        json.loads(found)
    except (FileNotFoundError, ValueError):
        return None
    return found


def _write(journal: IO[bytes], text: str) -> None:
    journal.truncate()
    journal.write(text.encode())
    journal.flush()
    os.fsync(journal.fileno())


def _text(described: Mapping[str, Any]) -> str:
    return json.dumps(described, indent=1, sort_keys=True) + "\n"
