import sys
from dataclasses import replace

import pytest
from reports import load_report

from sglang_overlay.observe import chart
from sglang_overlay.observe.chart import ChartError, Curve, draw
from sglang_overlay.observe.memory import MemoryUsage

GB = 10**9
STOCK = load_report(
    mode="stock",
    seconds=9.0,
    memory=MemoryUsage("RssAnon", GB, 2 * GB, GB, ((0.0, 0), (5.0, 2 * GB), (9.0, GB))),
    final_bytes=GB,
)
STREAMING = replace(
    STOCK,
    mode="streaming",
    seconds=5.0,
    memory=MemoryUsage("RssAnon", GB, GB + 5, GB, ((0.0, 0), (4.0, GB + 5), (5.0, GB))),
)


def _axes(*curves: Curve):
    return chart._figure(curves, "a title").axes[0]


def test_png_is_written_into_a_new_folder(tmp_path):
    pixels = pytest.importorskip("matplotlib.image")
    file = draw([Curve("stock", (STOCK,)), Curve("streaming", (STREAMING,))], tmp_path / "new" / "memory.png", "title")
    height, width = pixels.imread(file).shape[:2]
    assert (width, height) == (1440, 800)


def test_curves_hold_the_samples_in_gigabytes_and_seconds():
    axes = _axes(Curve("stock", (STOCK,)), Curve("streaming", (STREAMING,)))
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["stock: peak +2.00 GB"] == [[0.0, 0.0], [5.0, 2.0], [9.0, 1.0]]
    assert lines["streaming: peak +1.00 GB"][1] == [4.0, (GB + 5) / GB]
    assert "GB" in axes.get_ylabel()
    assert "RssAnon" in axes.get_ylabel()
    assert "seconds" in axes.get_xlabel()


def test_model_size_is_a_dashed_line_in_the_legend():
    axes = _axes(Curve("stock", (STOCK,)))
    dashed = [line for line in axes.get_lines() if line.get_label() == "loaded model: 1.00 GB"]
    assert [line.get_ydata()[0] for line in dashed] == [1.0]
    assert dashed[0].is_dashed()
    assert "loaded model: 1.00 GB" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_many_ranks_share_one_entry_named_by_the_highest_peak():
    higher = replace(STOCK, memory=replace(STOCK.memory, peak_above_start=3 * GB))
    axes = _axes(Curve("stock", (STOCK, higher)))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["stock: peak +3.00 GB (highest of 2 loads)", "loaded model: 1.00 GB"]
    assert axes.get_ylim()[1] > 3


def test_without_matplotlib_the_error_names_it(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ChartError, match=r"pip install matplotlib"):
        draw([Curve("stock", (STOCK,))], tmp_path / "memory.png", "title")


def test_reports_without_samples_cannot_be_drawn(tmp_path):
    bare = replace(STOCK, memory=replace(STOCK.memory, samples=()))
    with pytest.raises(ChartError, match="no memory samples"):
        draw([Curve("stock", (bare,))], tmp_path / "memory.png", "title")


def test_unwritable_file_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ChartError, match=r"file/memory\.png"):
        draw([Curve("stock", (STOCK,))], tmp_path / "file" / "memory.png", "title")
