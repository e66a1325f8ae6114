# SPDX-License-Identifier: Apache-2.0
"""Implements ``python -m sglang_overlay export``: sets up the process that traces SGLang's model, and prints."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sglang_overlay.core.messages import sentence
from sglang_overlay.errors import ExportError
from sglang_overlay.hooks import own_process
from sglang_overlay.observe.formats import bytes_text, count_text
from sglang_overlay.schemes import registry
from sglang_overlay.schemes.choice import parse

if TYPE_CHECKING:
    from sglang_overlay.offline.export.run import Exported

SCHEMA = "sglang-streamfp8/export"
VERSION = 1


def run(source: Path, target: Path, scheme: str, most: int, *, trust_remote_code: bool) -> Exported:
    """Export, with a progress bar on standard error, and return the result.

    Raises:
        StreamFP8Error: the checkpoint cannot be exported, or reading or writing failed.
    """
    schemes = parse(scheme, "--scheme")
    # Before SGLang is imported, which takes seconds.
    registry.check(schemes)
    console = Console(stderr=True)
    with console.status("Importing SGLang and tracing its loader ..."):
        os.environ.update(own_process.ENVIRON)
        # SGLang's modules warn about features that need other hardware.
        warnings.simplefilter("ignore")
        own_process.load_plugins()
        from sglang_overlay.offline.export.run import export
    try:
        return export(
            source,
            target,
            schemes,
            most,
            {"trust_remote_code": trust_remote_code},
            lambda total: _ExportBar(console, total),
        )
    except OSError as error:
        raise ExportError(
            f"{sentence(error)} Once that is mended, start the export again: it goes on with what is in {target}."
        ) from error


def summary(target: Path, made: Exported) -> str:
    """The result of an export in one line."""
    resumed = f", {made.resumed} of them written before" if made.resumed else ""
    return (
        f"{target}: {count_text(made.quantized, 'tensor')} of {made.tensors} quantized, "
        f"{bytes_text(made.source_bytes)} are {bytes_text(made.stored_bytes)} "
        f"in {count_text(made.shards, 'file')}{resumed}"
    )


def to_json(target: Path, made: Exported) -> dict[str, Any]:
    """The result of an export as plain JSON data. Sizes are bytes."""
    return {"schema": SCHEMA, "version": VERSION, "folder": str(target), **asdict(made)}


class _ExportBar:
    """A progress bar on a terminal; prints nothing to a file."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Bar(TextColumn("Writing"), *columns, console=console)
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def advance(self, count: int, /) -> None:
        """Note that ``count`` more bytes are written."""
        self._bar.advance(self._task, count)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
