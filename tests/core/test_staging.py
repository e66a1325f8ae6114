# SPDX-License-Identifier: Apache-2.0
"""Staged pieces of a unit, and the account of their memory."""

from __future__ import annotations

import torch

from sglang_overlay.core.staging import Piece, StagedUnit, StagingAccount


def hold(unit, first, last):
    box = ((first, last), (0, 8))
    unit.overwrite(box)
    unit.hold(Piece(box, torch.ones(last - first, 8)))


def test_piece_that_is_overwritten_is_not_counted_any_more():
    account = StagingAccount()
    unit = StagedUnit(account)
    hold(unit, 0, 2)
    hold(unit, 0, 4)
    assert (account.held, account.peak) == (4 * 8 * 4, 4 * 8 * 4)
    assert unit.covered == 32


def test_piece_of_which_a_part_is_left_keeps_its_memory():
    account = StagingAccount()
    unit = StagedUnit(account)
    hold(unit, 0, 4)
    hold(unit, 1, 2)
    assert account.held == (4 + 1) * 8 * 4
    assert sorted(piece.box[0][0] for piece in unit.pieces) == [0, 1, 2]
    unit.release()
    assert (account.held, unit.pieces) == (0, [])
