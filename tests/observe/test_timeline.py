from dataclasses import replace

import pytest
from reports import load_report

from sglang_overlay.observe.chart import Curve
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.timeline import timeline


def load(*samples, final=1_000_000_000):
    peak = max((above for _, above in samples), default=0)
    memory = MemoryUsage("RssAnon", 5, peak, peak, samples)
    return load_report(mode="streaming", seconds=2.0, memory=memory, final_bytes=final)


HALF_WAY = load((0.0, 0), (1.0, 1_000_000_000), (2.0, 2_000_000_000))


def test_samples_lie_between_the_axes_and_keep_their_proportions():
    drawn = timeline([Curve("streaming", (HALF_WAY,))], 600, 300)
    (line,) = drawn.lines
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.points.split())
    assert (x0, y0) == (drawn.left, drawn.bottom)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x2 == drawn.right
    assert drawn.top <= y2 == line.peak[1]


def test_dashed_line_is_where_the_model_ends_and_comes_once_for_equal_ranks():
    drawn = timeline([Curve("streaming", (HALF_WAY, HALF_WAY))], 600, 300)
    (model,) = drawn.models
    assert model == float(drawn.lines[0].points.split()[1].split(",")[1])


def test_rank_with_the_highest_peak_is_drawn_over_the_others():
    lower = load((0.0, 0), (2.0, 1_500_000_000))
    drawn = timeline([Curve("streaming", (HALF_WAY, lower))], 600, 300)
    assert [line.highest for line in drawn.lines] == [False, True]
    assert drawn.lines[1].peak[1] < drawn.lines[0].peak[1]


def test_memory_below_the_start_stays_on_the_axis():
    drawn = timeline([Curve("streaming", (load((0.0, 0), (1.0, -500_000_000), (2.0, 10)),))], 600, 300)
    assert max(float(point.split(",")[1]) for point in drawn.lines[0].points.split()) == drawn.bottom


@pytest.mark.parametrize(
    ("seconds", "above", "across", "up"),
    [
        (0.4, 2_500, "100 ms", "1 kB"),
        (6.0, 700, "2 s", "200 B"),
        (412.0, 168_000_000_000, "2 min", "50 GB"),
        (9.5, 30_000_000, "2 s", "10 MB"),
    ],
)
def test_axes_have_round_numbers(seconds, above, across, up):
    drawn = timeline([Curve("a", (load((0.0, 0), (seconds, above), final=above),))], 500, 300)
    assert (drawn.across[0].text, drawn.up[0].text) == ("0", "0")
    assert (drawn.across[1].text, drawn.up[1].text) == (across, up)
    assert 2 <= len(drawn.across) <= 6
    assert all(drawn.top <= tick.at <= drawn.bottom for tick in drawn.up)


def test_without_samples_there_is_nothing_to_draw():
    assert timeline([Curve("a", (load(),))], 600, 300) is None


def test_load_of_no_length_and_size_is_drawn():
    empty = replace(load((0.0, 0)), final_bytes=0)
    assert timeline([Curve("a", (empty,))], 600, 300).lines[0].points
