import time

from sglang_overlay.observe.layer_times import LayerTimes


def test_span_is_from_the_first_unit_to_the_last():
    times, began = LayerTimes(), time.perf_counter() - 10
    times.note("a")
    times.note("b")
    between = time.perf_counter() - began
    times.note("a")
    first, last = times.span("a", began)
    assert 10 <= first <= between <= last + 1e-3
    assert times.span("b", began)[0] == times.span("b", began)[1]


def test_layer_of_which_nothing_was_quantized_has_no_span():
    assert LayerTimes().span("a", 1.0) == (0.0, 0.0)
