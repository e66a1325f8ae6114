# SPDX-License-Identifier: Apache-2.0
"""An export that is under way: whose folder it is, what is in it already, and when it is finished.

The folder holds the journal from its first moment to the last, and whoever has the journal locked has the folder. It is
complete on disk before anything else is written, so one that was cut off stands for an export that had not begun. All
other files appear complete or not at all, ``config.json`` last: without it neither SGLang nor transformers takes a
folder for a model.
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
    """Hold a folder for an export; on leaving without an error the export is finished.

    Args:
        folder: made if missing; may hold what an earlier, interrupted export of the same has left.
        described: everything that decides what is written, as JSON data.

    Raises:
        ExportError: the folder has other contents, or somebody else is at it.
        OSError: it cannot be written to, or its file system has no locks.
    """
    journal = folder / JOURNAL
    # Decided before the folder is looked at: in one that is finished meanwhile, no journal is begun.
    mode = "r+b" if journal.exists() else "x+b"
    check_free_for(folder, described)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(journal, mode) as file:
        # Whoever held it before may have left it in another state.
        if check_free_for(folder, described) is None:
            _write(file, _text(described))
            sync_folder(folder)
        yield
        journal.unlink()
        sync_folder(folder)


def check_free(folder: Path) -> str | None:
    """Make sure that some export may be written to ``folder``.

    Returns:
        What the journal of an unfinished export there says, if there is one.

    Raises:
        ExportError: it has other contents than an unfinished export, or is no folder.
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
        As of ``check_free``.

    Raises:
        ExportError: as of ``check_free``, or another export is unfinished there.
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
    """Open a journal that nobody else holds. For writing: otherwise NFS locks it for nobody alone."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(journal.open(mode))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock of a file that whoever finished the export has removed since says nothing.
            is_held = os.path.samestat(os.fstat(file.fileno()), journal.stat())
        except (BlockingIOError, FileExistsError, FileNotFoundError):
            is_held = False
        if not is_held:
            raise ExportError(f"another export is writing to {journal.parent}")
        yield file


def _read(journal: Path) -> str | None:
    """What a journal says; None where there is none, or it was cut off while it was written."""
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
