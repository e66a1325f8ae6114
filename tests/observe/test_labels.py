from dataclasses import replace

from reports import STREAMED_LOAD

from sglang_overlay.observe.labels import labels_of, places_of
from sglang_overlay.observe.report import ParallelRank, Ranks


def load(tp=0, **fields):
    return replace(STREAMED_LOAD, ranks=Ranks(tp=ParallelRank(tp, 2)), **fields)


PAIR = [load(0), load(1)]


def test_ranks_of_one_folder_need_no_more_than_their_ranks():
    assert labels_of(PAIR, ["/somewhere/reports"] * 2) == ["TP0/2", "TP1/2"]


def test_folders_are_told_by_what_differs_in_their_paths():
    folders = ["fleet/moe/pod-a", "fleet/moe/pod-a", "fleet/moe/pod-b", "fleet/moe/pod-b"]
    assert labels_of(PAIR * 2, folders) == ["pod-a TP0/2", "pod-a TP1/2", "pod-b TP0/2", "pod-b TP1/2"]


def test_folder_within_another_is_told_from_it():
    assert places_of(PAIR, ["reports", "reports/old"]) == ["", "old"]


def test_folders_may_be_named_in_different_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places_of(PAIR, ["pods/a", str(tmp_path / "pods" / "b")]) == ["a", "b"]


def test_nodes_that_share_a_folder_are_told_apart():
    loads = [load(0, node="n1"), load(1, node="n2")]
    assert labels_of(loads, ["reports"] * 2) == ["n1 TP0/2", "n2 TP1/2"]
    assert places_of(loads * 2, ["a", "a", "b", "b"]) == ["a/n1", "a/n2", "b/n1", "b/n2"]


def test_node_of_a_folder_of_its_own_is_not_told_twice():
    assert places_of([load(node="n1"), load(node="n2")], ["pods/a", "pods/b"]) == ["a", "b"]


def test_loads_of_one_rank_are_counted_and_models_named():
    again = [load(0), load(0), load(1), replace(load(1), role="draft", model_path="models/eagle")]
    assert labels_of(again, ["reports"] * 4) == [
        "moe-1b TP0/2 #1",
        "moe-1b TP0/2 #2",
        "moe-1b TP1/2",
        "eagle TP1/2 draft",
    ]
