import json
import mmap
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_overlay.observe import memory
from sglang_overlay.observe.memory import (
    MAX_SAMPLES,
    AcceleratorMeter,
    MemorySampler,
    MemoryWatch,
    PsutilMeter,
    host_meter,
    meter_for,
    thin,
)

MB = 1_000_000
_IN_A_PROCESS = """
import json, mmap, sys, tempfile, time
from sglang_overlay.observe.memory import MemorySampler, host_meter

with MemorySampler(host_meter(), interval_ms={interval}) as sampler:
{body}
usage = sampler.usage
print(json.dumps([usage.metric, usage.start, usage.peak_above_start, usage.end_above_start, usage.samples]))
"""

_READ_MAPPED_FILE = """\
file = tempfile.NamedTemporaryFile()
for _ in range(100): file.write(bytes(1_000_000))
file.flush()
view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(view[::4096])
"""


def _measure(body: str, interval: float = 2) -> memory.MemoryUsage:
    """Run ``body`` under a sampler in a process of its own, where nothing else allocates."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS.format(body=lines, interval=interval)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    metric, start, peak, end, samples = json.loads(done.stdout)
    return memory.MemoryUsage(metric, start, peak, end, tuple((second, above) for second, above in samples))


def test_peak_shows_memory_that_was_held_for_a_moment_and_freed():
    usage = _measure("block = b'x' * 200_000_000\ntime.sleep(0.1)\ndel block\ntime.sleep(0.05)")
    assert 199 * MB <= usage.peak_above_start <= 215 * MB
    assert usage.end_above_start <= 15 * MB
    assert max(above for _, above in usage.samples) == usage.peak_above_start
    assert 0.15 <= usage.samples[-1][0] <= 30


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_peak_between_two_readings_is_seen():
    usage = _measure("block = b'x' * 200_000_000\ndel block", interval=60_000)
    assert len(usage.samples) == 2
    assert 199 * MB <= usage.peak_above_start <= 215 * MB
    assert usage.end_above_start <= 15 * MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_peak_between_two_readings_is_without_mapped_files():
    usage = _measure(
        f"{_READ_MAPPED_FILE}block = b'x' * 200_000_000\ndel block",
        interval=60_000,
    )
    assert 190 * MB <= usage.peak_above_start <= 215 * MB


def test_memory_still_held_shows_at_the_end():
    usage = _measure("block = b'x' * 200_000_000")
    assert 199 * MB <= usage.end_above_start <= usage.peak_above_start


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_pages_of_a_mapped_checkpoint_do_not_count():
    usage = _measure(f"{_READ_MAPPED_FILE}time.sleep(0.05)")
    assert usage.metric == "RssAnon"
    assert usage.peak_above_start <= 20 * MB


def test_usage_is_there_when_the_load_fails():
    sampler = MemorySampler(host_meter())
    with pytest.raises(KeyError), sampler:
        raise KeyError("no such tensor")
    assert sampler.usage.start > 0


def test_usage_is_not_there_while_the_load_runs():
    sampler = MemorySampler(host_meter())
    with sampler, pytest.raises(RuntimeError, match="has ended"):
        _ = sampler.usage


def test_shortest_load_has_a_start_and_an_end():
    with MemorySampler(host_meter(), interval_ms=60_000) as sampler:
        pass
    assert len(sampler.usage.samples) == 2


class _Scripted:
    """A meter that reads a script, then its last figure for ever."""

    metric = "script"
    shortest_ms = 0.0
    keeps_peak = True

    def __init__(self, *figures: int, exact_peak: int = 0) -> None:
        self._figures = list(figures)
        self._peak = exact_peak
        self.closed = 0

    def read(self) -> int:
        return self._figures.pop(0) if len(self._figures) > 1 else self._figures[0]

    def exact_peak(self) -> int:
        return self._peak

    def close(self) -> None:
        self.closed += 1


def test_exact_peak_of_the_allocator_wins_over_the_samples():
    meter = _Scripted(100, 150, exact_peak=900)
    with MemorySampler(meter, interval_ms=60_000) as sampler:
        pass
    assert sampler.usage.peak_above_start == 800
    assert meter.closed == 1


def test_watch_takes_two_readings_and_the_meters_peak():
    threads = threading.active_count()
    with MemoryWatch(_Scripted(100, 150, exact_peak=900)) as watch:
        assert threading.active_count() == threads
    assert watch.usage.peak_above_start == 800
    assert [above for _, above in watch.usage.samples] == [0, 50]


def test_readings_are_no_more_often_than_the_meter_allows():
    meter = _Scripted(*range(100, 1000))
    meter.shortest_ms = 60_000
    with MemorySampler(meter, interval_ms=1) as sampler:
        time.sleep(0.1)
    assert len(sampler.usage.samples) == 2


def test_accelerator_is_read_every_20_ms_at_most():
    assert AcceleratorMeter.shortest_ms >= 20


def test_end_below_start_is_negative():
    with MemorySampler(_Scripted(500, 200), interval_ms=60_000) as sampler:
        pass
    assert (sampler.usage.end_above_start, sampler.usage.peak_above_start) == (-300, 0)


def test_watching_a_long_load_keeps_a_bounded_buffer_and_its_peak(monkeypatch):
    monkeypatch.setattr(memory, "_BUFFER_SAMPLES", 64)
    meter = _Scripted(*range(500, 530), 1_000_500, *range(500, 900))
    with MemorySampler(meter, interval_ms=0.2) as sampler:
        deadline = time.monotonic() + 30
        while len(meter._figures) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
            assert len(sampler._bytes) <= 64
    assert sampler.usage.peak_above_start == 1_000_000
    assert max(above for _, above in sampler.usage.samples) == 1_000_000
    assert min(above for _, above in sampler.usage.samples) == 0
    assert len(sampler.usage.samples) <= 64


@pytest.mark.parametrize("interval", [0, -1])
def test_interval_must_be_above_zero(interval):
    with pytest.raises(ValueError, match="interval_ms"):
        MemorySampler(host_meter(), interval_ms=interval)


def test_psutil_takes_over_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROC_STATUS", tmp_path / "nothing")
    meter = host_meter()
    assert isinstance(meter, PsutilMeter)
    assert meter.metric in ("psutil.uss", "psutil.rss")
    before = meter.read()
    # From the system itself: malloc may have as much left from before.
    with mmap.mmap(-1, 50 * MB) as block:
        for _ in range(50):
            block.write(b"x" * MB)
        assert meter.read() - before == pytest.approx(len(block), rel=0.1)


def test_cpu_load_is_measured_in_host_memory():
    meter = meter_for("cpu")
    assert meter.metric == host_meter().metric
    assert meter.read() > 10 * MB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_the_allocators_own():
    with MemorySampler(meter_for("cuda"), interval_ms=60_000) as sampler:
        block = torch.empty(64 * MB, dtype=torch.uint8, device="cuda")
        del block
    assert sampler.usage.metric == "torch.cuda.memory_allocated"
    assert sampler.usage.peak_above_start >= 64 * MB
    assert sampler.usage.end_above_start == 0


_CURVES = st.lists(
    st.tuples(st.floats(0, 1e4, allow_nan=False), st.integers(-(2**40), 2**40)), min_size=1, max_size=300
).map(lambda samples: sorted(samples, key=lambda sample: sample[0]))


@given(samples=_CURVES, limit=st.integers(4, 60))
def test_thinning_keeps_ends_peak_and_valley_within_the_limit(samples, limit):
    kept = thin(samples, limit)
    assert len(kept) <= limit
    assert (kept[0], kept[-1]) == (samples[0], samples[-1])
    assert max(above for _, above in kept) == max(above for _, above in samples)
    assert min(above for _, above in kept) == min(above for _, above in samples)
    remaining = iter(samples)
    assert all(sample in remaining for sample in kept), "kept samples are samples, in their order"


def test_thinning_keeps_each_of_many_separate_spikes():
    samples = [(index / 1000, 1_000 if index % 1000 == 500 else 0) for index in range(20_000)]
    kept = thin(samples, MAX_SAMPLES)
    assert len(kept) <= MAX_SAMPLES
    assert sum(above == 1_000 for _, above in kept) == 20


def test_thinning_leaves_a_short_curve_alone():
    samples = [(0.0, 0), (1.0, 5), (2.0, 3), (3.0, 9)]
    assert thin(samples, 4) == samples
