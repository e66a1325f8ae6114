import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reports import STOCK_LOAD, STREAMED_LOAD

from sglang_overlay.observe.folders import Group
from sglang_overlay.observe.page import render, write
from sglang_overlay.observe.report import (
    LayerCounts,
    LayerFigures,
    LayerNote,
    ParallelRank,
    Ranks,
    ReportError,
    UnitCounts,
)

STREAMED = replace(
    STREAMED_LOAD,
    units=UnitCounts(1234, 1000),
    layers=LayerCounts(
        1,
        deferred=(LayerNote("layers.0.kv_b_proj", "MLA absorbs it"),),
        fallback=(LayerNote("layers.7.packed", 'packed "by" <hand> & so'),),
        figures=(LayerFigures("layers.0.experts", 1234, 1000, 640_000_000, 1.5, 3.0),),
    ),
    warnings=("a <script>alert(1)</script>",),
    missing=("model.norm.weight",),
)
VOID = {"meta", "line", "polyline", "circle"}


class Page(HTMLParser):
    """What a browser would see: text, attributes, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())

    def rows(self):
        return "\n".join(self.words)


def ranks(load, size=2):
    return [replace(load, ranks=Ranks(ParallelRank(rank, size))) for rank in range(size)]


def group(name, loads):
    return Group(name, loads, [name] * len(loads))


BOTH = [group("stock", ranks(STOCK_LOAD)), group("streaming", ranks(STREAMED))]


@pytest.fixture(scope="module")
def both():
    return render(BOTH)


def test_page_is_whole_and_asks_for_nothing_from_elsewhere(both):
    page = Page(both)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", both)
    assert not [
        name for _, name, _ in page.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")
    ]


def test_page_says_first_what_loading_took(both):
    assert (
        "Peak 1.38 GB above the start, 1.10x the loaded model&#39;s 1.25 GB; 0.55x the peak of stock. Loaded in 6.0 s. "
        "1 layer fell back to stock&#39;s path." in both
    )


def test_chart_is_there_for_wide_screens_and_for_phones_and_says_what_it_shows(both):
    page = Page(both)
    assert page.tags.count("svg") == 2
    assert [value for tag, name, value in page.attributes if (tag, name) == ("svg", "role")] == ["img", "img"]
    labelled = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-labelledby")]
    assert labelled == [value for tag, name, value in page.attributes if (tag, name) == ("title", "id")]
    # Two ranks of two folders, twice.
    assert page.tags.count("polyline") == 8


def test_every_rank_has_a_row_and_is_compared(both):
    words = Page(both).rows()
    assert words.count("TP0/2") == words.count("TP1/2") == 3
    assert "6.0 s / 10.0 s\n0.60x\n1.38 GB / 2.50 GB\n0.55x" in words


def test_every_layer_has_a_row_all_ranks_together(both):
    words = Page(both).rows()
    assert "layers.0.experts\nstreamed\n2\n2468\n2000\n1.28 GB\n1.5 s to 3.0 s" in words
    assert "layers.0.kv_b_proj\ndeferred\n2\n-\n-\n-\nMLA absorbs it" in words
    assert "left:25.00%;width:25.00%" in both


def test_what_went_wrong_is_listed_once_and_is_text_whatever_it_holds(both):
    page = Page(both)
    assert page.words.count("a <script>alert(1)</script>") == 1
    assert page.words.count("model.norm.weight") == 1
    assert '1 layer fell back: packed "by" <hand> & so (layers.7.packed)' in page.words


def test_page_of_one_folder_compares_nothing():
    words = Page(render([group("streaming", [STREAMED])])).rows()
    assert "against" not in words
    assert "Ranks of streaming" in words


def test_stock_loads_have_no_columns_of_streaming():
    words = Page(render([group("stock", [STOCK_LOAD])])).rows()
    assert "peak / model" in words
    assert "fell back" not in words


def test_reports_without_samples_and_figures_are_shown_all_the_same():
    bare = replace(STREAMED, memory=replace(STREAMED.memory, samples=()), layers=LayerCounts(1))
    words = Page(render([group("streaming", [bare])])).rows()
    assert "These reports hold no memory samples." in words
    assert "These reports tell nothing of single layers." in words


def test_fleet_has_a_row_for_each_load_and_what_differs_comes_before_all_else():
    pods = [f"fleet/pod-{index}" for index in range(20) for _ in range(2)]
    loads = ranks(STREAMED) * 20
    loads[13] = replace(loads[13], seconds=60.0, model_path="/mnt/moe-1b")
    page = Page(render([Group("fleet", loads, pods)]))
    words = page.rows()
    assert words.index("slowest: pod-6 TP1/2, 60.0 s; median 6.0 s") < words.index("Memory above")
    assert words.count("pod-6 TP1/2\nstreaming") == 1
    assert "(highest of 40 loads, 21 drawn)" in words
    assert page.tags.count("polyline") == 2 * 21
    assert "layers.0.experts\nstreamed\n40\n" in words


def test_layers_of_different_models_are_not_added_up():
    other = replace(STREAMED, model_path="models/other", layers=replace(STREAMED.layers, fallback=()))
    words = Page(render([Group("fleet", [STREAMED, other], ["a", "b"])])).rows()
    assert words.count("layers.0.experts\nstreamed\n1\n") == 2
    assert "3 layers of moe-1b" in words
    assert "2 layers of other" in words


def test_file_that_cannot_be_written_is_named(tmp_path):
    assert write(BOTH, tmp_path / "new" / "report.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReportError, match=r"file/report\.html"):
        write(BOTH, tmp_path / "file" / "report.html")
