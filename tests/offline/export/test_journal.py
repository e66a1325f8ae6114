# SPDX-License-Identifier: Apache-2.0
"""A folder belongs to one export at a time, from before its first file to after its last."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_overlay.errors import ExportError
from sglang_overlay.offline.export.journal import JOURNAL, begun

DESCRIBED = {"source": [["model.safetensors", 1, 2]], "shards": {"model.safetensors": ["a", "b"]}}


class Stopped(Exception):  # noqa: N818 - reads as what happened
    """An export ends before it is finished."""


def interrupt(folder, described=DESCRIBED):
    with pytest.raises(Stopped), begun(folder, described):
        raise Stopped


def refused(folder):
    """Whether an export is told that there is another one. It stops at once where it is not."""
    try:
        with begun(folder, DESCRIBED):
            raise Stopped
    except ExportError as error:
        return "another export is writing to" in str(error)
    except Stopped:
        return False


def test_folder_is_held_by_one_export(tmp_path):
    with begun(tmp_path, DESCRIBED):
        assert refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_held_until_its_journal_is_gone(tmp_path, monkeypatch):
    unlink, found = Path.unlink, []

    def tried_before(path):
        found.append(refused(tmp_path))
        unlink(path)

    monkeypatch.setattr(Path, "unlink", tried_before)
    with begun(tmp_path, DESCRIBED):
        pass
    assert found == [True]


def test_lock_on_the_journal_of_a_finished_export_is_no_hold(tmp_path, monkeypatch):
    first, flock = ExitStack(), fcntl.flock
    first.enter_context(begun(tmp_path, DESCRIBED))

    def after_the_first(file, kind):
        first.close()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", after_the_first)
    assert refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_that_finishes_before_the_journal_is_opened_leaves_no_room_for_another(tmp_path, monkeypatch):
    first, mkdir = ExitStack(), Path.mkdir
    first.enter_context(begun(tmp_path, DESCRIBED))

    def after_the_first(path, **fields):
        (tmp_path / "config.json").touch()
        first.close()
        mkdir(path, **fields)

    monkeypatch.setattr(Path, "mkdir", after_the_first)
    assert refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_export_that_dies_while_it_writes_its_journal_can_begin_again(tmp_path, monkeypatch):
    def dies(_file):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", dies)
        interrupt(tmp_path)
    with begun(tmp_path, DESCRIBED):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut_off", [b"", b'{\n "shards": {\n', b"{" * 1000, bytes(1000)])
def test_journal_that_was_cut_off_is_written_anew(cut_off, tmp_path):
    interrupt(tmp_path)
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(cut_off)
    interrupt(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == whole


def test_journal_that_was_cut_off_does_not_make_other_contents_an_export(tmp_path):
    (tmp_path / JOURNAL).touch()
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"), begun(tmp_path, DESCRIBED):
        pass


def test_journal_that_something_else_has_completed_meanwhile_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / JOURNAL).touch()
    mkdir = Path.mkdir

    def after_another(path, **fields):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        interrupt(tmp_path, {"source": "something else"})
        mkdir(path, **fields)

    monkeypatch.setattr(Path, "mkdir", after_another)
    with pytest.raises(ExportError, match="unfinished export of something else"):
        interrupt(tmp_path)
