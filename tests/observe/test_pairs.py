from dataclasses import replace

from reports import load_report

from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.pairs import pair_up, stock_first
from sglang_overlay.observe.report import LoadReport, ParallelRank, Ranks

STOCK = load_report(
    mode="stock",
    seconds=10.0,
    memory=MemoryUsage("RssAnon", 1, 2_000, 1_000),
    final_bytes=1_000,
)
STREAMING = replace(STOCK, mode="streaming", seconds=6.0, memory=MemoryUsage("RssAnon", 1, 1_100, 1_000))


def _at(report: LoadReport, tp: int, **changes) -> LoadReport:
    return replace(report, ranks=Ranks(tp=ParallelRank(tp, 2)), **changes)


def test_ranks_meet_whatever_their_order():
    pairs = pair_up([_at(STOCK, 0), _at(STOCK, 1)], [_at(STREAMING, 1, seconds=5.0), _at(STREAMING, 0)])
    assert [(pair.first.ranks.tp.rank, pair.second.seconds) for pair in pairs] == [(0, 6.0), (1, 5.0)]
    assert (pairs[0].seconds_ratio, pairs[0].peak_ratio) == (0.6, 0.55)


def test_draft_model_meets_draft_model_and_repeated_loads_meet_in_order():
    draft = replace(STREAMING, role="draft", seconds=1.0)
    pairs = pair_up([STOCK, replace(STOCK, role="draft"), STOCK], [draft, STREAMING, replace(STREAMING, seconds=7.0)])
    assert [pair.second.seconds for pair in pairs] == [6.0, 1.0, 7.0]


def test_load_without_partner_drops_out():
    assert pair_up([_at(STOCK, 0)], [_at(STREAMING, 1)]) == []


def test_peaks_measured_differently_are_not_compared():
    on_gpu = replace(STREAMING, memory=replace(STREAMING.memory, metric="torch.cuda.memory_allocated"))
    assert pair_up([STOCK], [on_gpu])[0].peak_ratio is None


def test_nothing_is_divided_by_zero():
    assert pair_up([replace(STOCK, seconds=0.0)], [STREAMING])[0].seconds_ratio is None


def test_stock_is_what_streaming_is_compared_with():
    assert stock_first([STOCK], [STREAMING])
    assert not stock_first([STREAMING], [STOCK])
    assert stock_first([STREAMING], [STREAMING])
    assert stock_first([STOCK], [STOCK])
