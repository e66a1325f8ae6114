# SPDX-License-Identifier: Apache-2.0
"""Folders survive being cut and carried, and what did not is named."""

from __future__ import annotations

import random
import shutil

import pytest
from workbench.gpu import pieces
from workbench.gpu.pieces import DamagedPiecesError

CONTENTS = {"site/a.py": b"", "site/b/c.so": random.Random(0).randbytes(25_000), "jit/d.so": b"d" * 5000}


@pytest.fixture
def packed(tmp_path):
    """A folder of pieces of at most 10 kB, and what their manifest says."""
    folder, out = tmp_path / "folder", tmp_path / "out"
    out.mkdir()
    for name, content in CONTENTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return out, pieces.pack(folder, out, 10_000, release="1.2.3")


def unpacked(out, target):
    pieces.unpack(out, target)
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_folder_is_the_same_after_packing_and_unpacking(packed, tmp_path):
    out, manifest = packed
    assert unpacked(out, tmp_path / "unpacked") == CONTENTS
    assert pieces.read_manifest(out) == manifest
    assert (manifest.facts, manifest.unpacked) == ({"release": "1.2.3"}, 30_000)


def test_no_piece_is_larger_than_asked_for(packed):
    out, manifest = packed
    sizes = [(out / piece.name / piece.name).stat().st_size for piece in manifest.pieces]
    assert len(sizes) > 2
    assert sizes == [piece.size for piece in manifest.pieces]
    assert max(sizes) <= 10_000
    assert sorted(path.name for path in out.iterdir()) == [piece.name for piece in manifest.pieces]


def test_pieces_are_found_where_their_folders_were_emptied_into_one(packed, tmp_path):
    out, manifest = packed
    flat = tmp_path / "flat"
    flat.mkdir()
    for piece in manifest.pieces:
        shutil.copytree(out / piece.name, flat, dirs_exist_ok=True)
    assert unpacked(flat, tmp_path / "unpacked") == CONTENTS


def test_missing_piece_is_named(packed, tmp_path):
    out, _ = packed
    shutil.rmtree(out / "piece-01")
    with pytest.raises(DamagedPiecesError, match=r"piece-01 is missing"):
        pieces.unpack(out, tmp_path / "unpacked")


def test_damaged_piece_is_named(packed, tmp_path):
    out, _ = packed
    damaged = out / "piece-02" / "piece-02"
    content = bytearray(damaged.read_bytes())
    content[7] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamagedPiecesError, match=r"piece-02 is not what the manifest says"):
        pieces.unpack(out, tmp_path / "unpacked")


def test_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DamagedPiecesError, match=r"no manifest\.json"):
        pieces.unpack(tmp_path, tmp_path / "unpacked")
