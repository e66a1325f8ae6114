from dataclasses import replace

from reports import load_report

from sglang_overlay.observe.layer_table import by_reason, layers_of
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import LayerCounts, LayerFigures, LayerNote

LOAD = load_report(mode="streaming", seconds=5.0, memory=MemoryUsage("RssAnon", 0, 3, 2), final_bytes=2)


def load(*figures, deferred=(), fallback=()):
    notes = [tuple(LayerNote(name, "a reason") for name in names) for names in (deferred, fallback)]
    return replace(LOAD, layers=LayerCounts(len(figures), *notes, figures=figures))


def test_ranks_of_a_layer_are_added_up():
    ranks = [
        load(LayerFigures("experts", 8, 6, 100, 0.5, 1.5)),
        load(LayerFigures("experts", 4, 4, 50, 0.25, 1.0)),
    ]
    (layer,) = layers_of(ranks)
    assert (layer.ranks, layer.units, layer.direct, layer.bytes) == (2, 12, 10, 150)
    assert (layer.first_seconds, layer.last_seconds) == (0.25, 1.5)


def test_what_was_not_streamed_comes_first():
    found = layers_of([load(LayerFigures("a", 1, 1, 1), deferred=["b", "c"], fallback=["d"])])
    assert [(layer.path, layer.name) for layer in found] == [
        ("fell back", "d"),
        ("deferred", "b"),
        ("deferred", "c"),
        ("streamed", "a"),
    ]


def test_layer_that_fell_back_on_one_rank_alone_is_there_twice():
    found = layers_of([load(LayerFigures("a", 1, 1, 1)), load(fallback=["a"])])
    assert [(layer.path, layer.ranks) for layer in found] == [("fell back", 1), ("streamed", 1)]


def test_layers_are_grouped_by_why_they_were_not_streamed():
    groups = by_reason(layers_of([load(LayerFigures("a", 1, 1, 1), deferred=["b", "c"])]))
    assert {reason: [layer.name for layer in layers] for reason, layers in groups.items()} == {"a reason": ["b", "c"]}
