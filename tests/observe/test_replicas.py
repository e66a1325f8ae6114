from __future__ import annotations

from sglang_overlay.observe.replicas import Replica, ServedRank, compare, lines, to_json

ONE, OTHER = "0" * 16, "f" * 16


def replica(name, *checksums, layers=None):
    """With a rank for each checksum; of their layers, one is the same everywhere."""
    return Replica(
        name,
        {
            ("target", 0, rank): ServedRank(
                checksum, {"embed": ONE, "layers.0": checksum} if layers is None else layers
            )
            for rank, checksum in enumerate(checksums)
        },
    )


def test_ranks_are_compared_with_the_same_ranks_and_not_with_one_another():
    found = compare([replica("a", ONE, OTHER), replica("b", ONE, OTHER)])
    assert [(each.name, each.is_equal, each.layers) for each in found] == [
        ("target PP0 TP0", True, ()),
        ("target PP0 TP1", True, ()),
    ]
    assert lines(found[1]) == [f"target PP0 TP1: equal, {OTHER}"]


def test_rank_that_differs_is_shown_with_each_replicas_checksum_and_the_layers():
    found = compare([replica("a", ONE, ONE), replica("b", ONE, OTHER), replica("c", ONE, ONE)])
    assert [each.is_equal for each in found] == [True, False]
    assert lines(found[1]) == [
        "target PP0 TP1: differs",
        f"  {ONE} a",
        f"  {OTHER} b",
        f"  {ONE} c",
        "  in layers.0",
    ]
    assert to_json(found)["equal"] is False
    assert to_json(found)["ranks"][1] == {
        "role": "target",
        "pp": 0,
        "tp": 1,
        "equal": False,
        "checksums": {"a": ONE, "b": OTHER, "c": ONE},
        "layers": ["layers.0"],
    }


def test_replicas_of_another_number_of_ranks_differ():
    found = compare([replica("a", ONE), replica("b", ONE, ONE)])
    assert [each.is_equal for each in found] == [True, False]
    assert lines(found[1]) == ["target PP0 TP1: differs", f"  {'none':16} a", f"  {ONE} b"]


def test_rank_whose_checksum_is_not_known_is_equal_to_none():
    (found,) = compare([replica("a", None, layers={}), replica("b", None, layers={})])
    assert not found.is_equal


def test_layers_that_are_not_told_are_no_difference():
    """As of ranks of later pipeline stages."""
    (found,) = compare([replica("a", ONE, layers={}), replica("b", OTHER)])
    assert found.layers == ()
    assert not found.is_equal
