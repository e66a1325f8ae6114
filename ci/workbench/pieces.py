# SPDX-License-Identifier: Apache-2.0
"""Files cut into pieces small enough to be carried one by one, and put together again. Standard library only.

OUT/manifest.json        what the files and the pieces are: sizes and SHA-256
OUT/piece-00/piece-00    a part of one tar archive; a folder each, as folders are what is carried
OUT/piece-01/piece-01
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
_ARCHIVE = "files.tar"
_BLOCK = 1 << 20


class DamagedPiecesError(RuntimeError):
    """What is there is not what the manifest names; the message says which file."""


@dataclass(frozen=True)
class Content:
    """A file as the manifest names it; ``size`` in bytes."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Content:
        """What ``path`` holds, under its own name."""
        return cls(path.name, path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Manifest:
    """What was packed: ``facts`` that the packer wants known, the files, and the pieces in order."""

    facts: dict[str, Any]
    files: tuple[Content, ...]
    pieces: tuple[Content, ...]


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(files: Sequence[Path], out: Path, piece_bytes: int, **facts: Any) -> Manifest:
    """Write ``files`` into pieces of at most ``piece_bytes`` under ``out``, and the manifest beside them."""
    archive = out / _ARCHIVE
    with tarfile.open(archive, "w") as tar:
        for file in sorted(files):
            tar.add(file, arcname=file.name)
    pieces = list(_cut(archive, out, piece_bytes))
    archive.unlink()
    manifest = Manifest(facts, tuple(map(Content.of, sorted(files))), tuple(map(Content.of, pieces)))
    (out / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    # With the first piece, so that whoever carries the pieces carries it too.
    shutil.copy(out / MANIFEST, pieces[0].parent)
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
    """The manifest that lies in ``folder``, or with the first piece under it.

    Raises:
        DamagedPiecesError: there is none.
    """
    for found in (folder / MANIFEST, folder / "piece-00" / MANIFEST):
        if found.is_file():
            read = json.loads(found.read_text(encoding="utf-8"))
            contents = {key: tuple(Content(**entry) for entry in read[key]) for key in ("files", "pieces")}
            return Manifest(read["facts"], **contents)
    raise DamagedPiecesError(f"{folder} has no {MANIFEST}: it comes with the first piece, from ci/gpu_wheels")


def unpack(folder: Path, out: Path) -> list[Path]:
    """Put the pieces in ``folder`` (in folders of their own or not) together, and the files into ``out``.

    Raises:
        DamagedPiecesError: a piece or a file is missing, or is not what the manifest says.
    """
    manifest = read_manifest(folder)
    out.mkdir(parents=True, exist_ok=True)
    archive = out / _ARCHIVE
    with archive.open("wb") as whole:
        for piece in manifest.pieces:
            with _found(folder, piece).open("rb") as part:
                shutil.copyfileobj(part, whole, _BLOCK)
    with tarfile.open(archive) as tar:
        # Not extractall: what the manifest does not name stays there, and Python 3.11.2 has no filter for the rest.
        unpacked = [_extracted(tar, file, out) for file in manifest.files]
    archive.unlink()
    return unpacked


def _extracted(tar: tarfile.TarFile, file: Content, out: Path) -> Path:
    target = out / file.name
    if target.parent != out:
        raise DamagedPiecesError(f"the manifest names {file.name}, which is no plain file name")
    try:
        packed = tar.extractfile(file.name)
    except KeyError:
        packed = None
    if packed is None:
        raise DamagedPiecesError(f"{target} is missing")
    with packed, target.open("wb") as written:
        shutil.copyfileobj(packed, written, _BLOCK)
    return _checked(target, file)


def _found(folder: Path, piece: Content) -> Path:
    places = (folder / piece.name, folder / piece.name / piece.name)
    return _checked(next((place for place in places if place.is_file()), places[0]), piece)


def _checked(path: Path, wanted: Content) -> Path:
    if not path.is_file():
        raise DamagedPiecesError(f"{path} is missing")
    if Content.of(path) != wanted:
        raise DamagedPiecesError(f"{path} is not what the manifest says ({wanted.size} bytes, {wanted.sha256})")
    return path
