# SPDX-License-Identifier: Apache-2.0
"""Pack a folder into one compressed archive, cut into pieces that can be carried one by one. Standard library only.

OUT/piece-00/piece-00       a part of one .tar.xz; each in its own folder, since folders are carried
OUT/piece-00/manifest.json  sizes and SHA-256 of the pieces
OUT/piece-01/piece-01
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

MANIFEST = "manifest.json"
_ARCHIVE = "folder.tar.xz"
_BLOCK = 1 << 20
_PRESET: Final = 6
"""Level of xz: 9 takes half as long again for a slightly smaller archive."""


class DamagedPiecesError(RuntimeError):
    """The pieces do not match the manifest; the message says which one."""


@dataclass(frozen=True)
class Piece:
    """A piece as in the manifest; ``size`` in bytes."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Piece:
        """The piece in the file ``path``, under its own name."""
        with path.open("rb") as file:
            return cls(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The contents of an archive: the packer's ``facts``, the unpacked bytes, and the pieces in order."""

    facts: dict[str, Any]
    unpacked: int
    pieces: tuple[Piece, ...]


def pack(folder: Path, out: Path, piece_bytes: int, **facts: Any) -> Manifest:
    """Pack ``folder`` into pieces of at most ``piece_bytes`` under ``out``, with the manifest next to the first."""
    archive = out / _ARCHIVE
    with tarfile.open(archive, "w:xz", preset=_PRESET) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    pieces = list(_cut(archive, out, piece_bytes))
    archive.unlink()
    unpacked = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(facts, unpacked, tuple(map(Piece.of, pieces)))
    (pieces[0].parent / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def _cut(archive: Path, out: Path, piece_bytes: int) -> Iterator[Path]:
    with archive.open("rb") as whole:
        for number in range(-(-archive.stat().st_size // piece_bytes)):
            piece = out / f"piece-{number:02d}" / f"piece-{number:02d}"
            piece.parent.mkdir()
            with piece.open("wb") as part:
                _copy(whole, part, piece_bytes)
            yield piece


def _copy(source: BinaryIO, target: BinaryIO, limit: int) -> None:
    while limit and (block := source.read(min(_BLOCK, limit))):
        target.write(block)
        limit -= len(block)


def read_manifest(folder: Path) -> Manifest:
    """The manifest next to the first piece under ``folder``, or in ``folder`` if all pieces were copied there.

    Raises:
        DamagedPiecesError: there is none.
    """
    for found in (folder / MANIFEST, folder / "piece-00" / MANIFEST):
        if found.is_file():
            read = json.loads(found.read_text(encoding="utf-8"))
            return Manifest(read["facts"], read["unpacked"], tuple(Piece(**entry) for entry in read["pieces"]))
    raise DamagedPiecesError(f"{folder} has no {MANIFEST}: it comes with the first piece, from ci/gpu_wheels")


def unpack(folder: Path, out: Path) -> None:
    """Join the pieces in ``folder`` (in their own folders or not), and unpack the archive into ``out``.

    Raises:
        DamagedPiecesError: a piece is missing, or does not match the manifest.
    """
    manifest = read_manifest(folder)
    out.mkdir(parents=True, exist_ok=True)
    archive = out / _ARCHIVE
    with archive.open("wb") as whole:
        for piece in manifest.pieces:
            with _found(folder, piece).open("rb") as part:
                shutil.copyfileobj(part, whole, _BLOCK)
    with tarfile.open(archive) as tar:
        # Debian's Python 3.11.2 has no filters yet.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(out)
    archive.unlink()


def _found(folder: Path, wanted: Piece) -> Path:
    places = (folder / wanted.name, folder / wanted.name / wanted.name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DamagedPiecesError(f"{places[0]} is missing")
    if Piece.of(path) != wanted:
        raise DamagedPiecesError(f"{path} is not what the manifest says ({wanted.size} bytes, {wanted.sha256})")
    return path
