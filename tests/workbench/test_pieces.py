# SPDX-License-Identifier: Apache-2.0
"""Files survive being cut and carried, and what did not is named."""

from __future__ import annotations

import shutil

import pytest
from workbench import pieces
from workbench.pieces import DamagedPiecesError

CONTENTS = {"a.whl": b"", "b.whl": bytes(range(256)) * 100, "c.whl": b"c" * 5000}


@pytest.fixture
def packed(tmp_path):
    """A folder of pieces of at most 10 kB, and what their manifest says."""
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    out.mkdir()
    for name, content in CONTENTS.items():
        (files / name).write_bytes(content)
    return out, pieces.pack(list(files.iterdir()), out, 10_000, release="1.2.3")


def contents(files):
    return {file.name: file.read_bytes() for file in files}


def test_files_are_the_same_after_packing_and_unpacking(packed, tmp_path):
    out, manifest = packed
    assert contents(pieces.unpack(out, tmp_path / "unpacked")) == CONTENTS
    assert sorted(path.name for path in (tmp_path / "unpacked").iterdir()) == sorted(CONTENTS)
    assert pieces.read_manifest(out) == manifest


def test_no_piece_is_larger_than_asked_for(packed):
    out, manifest = packed
    sizes = [(out / piece.name / piece.name).stat().st_size for piece in manifest.pieces]
    assert len(sizes) > 2
    assert sizes == [piece.size for piece in manifest.pieces]
    assert max(sizes) <= 10_000
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", *(piece.name for piece in manifest.pieces)]


def test_pieces_are_found_where_their_folders_were_emptied_into_one(packed, tmp_path):
    out, manifest = packed
    flat = tmp_path / "flat"
    flat.mkdir()
    for piece in manifest.pieces:
        shutil.copytree(out / piece.name, flat, dirs_exist_ok=True)
    assert contents(pieces.unpack(flat, tmp_path / "unpacked")) == CONTENTS


def test_folders_of_pieces_are_enough_without_the_manifest_beside_them(packed, tmp_path):
    out, _ = packed
    (out / "manifest.json").unlink()
    assert contents(pieces.unpack(out, tmp_path / "unpacked")) == CONTENTS


@pytest.mark.parametrize("name", ["../a.whl", "other.whl"])
def test_file_that_was_not_packed_is_named_and_nothing_is_written_elsewhere(name, packed, tmp_path):
    out, _ = packed
    for manifest in (out / "manifest.json", out / "piece-00" / "manifest.json"):
        manifest.write_text(manifest.read_text().replace("a.whl", name))
    with pytest.raises(DamagedPiecesError, match=name):
        pieces.unpack(out, tmp_path / "unpacked")
    assert not (tmp_path / "a.whl").exists()


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
