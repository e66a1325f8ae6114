# SPDX-License-Identifier: Apache-2.0
"""Measure this process's memory while a model loads: its start, its peak, and the curve in between.

Three sources, in order of preference for the device the model loads to:

- an accelerator: bytes held by live tensors, as PyTorch's caching allocator counts them, with its own exact peak;
- the CPU on Linux: ``RssAnon`` of /proc/self/status, the process's own memory (pages of a mapped checkpoint are
  ``RssFile``, can be dropped by the kernel at any time, and do not count), with peaks between two readings taken from
  ``VmHWM``;
- elsewhere: ``psutil``'s unique set size, or resident set size if that is not available.

The metric's name is recorded, so that figures from different sources are never compared by accident.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sglang_overlay.errors import StreamFP8Error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    import torch

DEFAULT_INTERVAL_MS = 5.0
MAX_SAMPLES = 500
# Enough for 80 s at the default interval (16 bytes a sample). Then older samples are thinned, so that a load of half an
# hour needs no more memory for samples than a short one.
_BUFFER_SAMPLES = 16_384
_PROC_STATUS = Path("/proc/self/status")
_STATUS_BYTES = 16_384

Sample = tuple[float, int]


class MemoryMetricError(StreamFP8Error):
    """Memory cannot be measured on this machine."""


@dataclass(frozen=True)
class MemoryUsage:
    """Memory of one process over one load.

    Attributes:
        metric: what was read, e.g. 'RssAnon' or 'torch.cuda.memory_allocated'.
        start: bytes when measuring began.
        peak_above_start: highest value minus start, in bytes; exact on an accelerator. On Linux, a peak between two
            readings is seen only if it is the highest of the process so far; elsewhere only readings count.
        end_above_start: last reading minus start, in bytes; negative when the process ended smaller.
        samples: (seconds since start, bytes above start), at most ``MAX_SAMPLES``, in order of time.
    """

    metric: str
    start: int
    peak_above_start: int
    end_above_start: int
    samples: tuple[Sample, ...] = ()


class Meter(Protocol):
    """Reads one memory figure. ``close`` is called once, after the last reading.

    Attributes:
        metric: its name.
        shortest_ms: shortest interval between readings, since a reading takes time from the load.
        keeps_peak: whether ``exact_peak`` makes samples unnecessary for the peak.
    """

    metric: str
    shortest_ms: float
    keeps_peak: bool

    def read(self) -> int:
        """Bytes now."""

    def exact_peak(self) -> int:
        """Highest value since the meter was made, in bytes; 0 if the source does not keep one."""

    def close(self) -> None: ...


class RssAnonMeter:
    """Anonymous resident memory from Linux's /proc/self/status. The file stays open: a reading is one ``pread``.

    Samples miss what comes and goes between them, up to a quarter of a peak. ``VmHWM``, the highest resident size so
    far, does not: if it has risen since the previous reading, its excess over the mapped files was anonymous memory. It
    is never reset, since others may read it.
    """

    metric = "RssAnon"
    shortest_ms = 0.0
    keeps_peak = False

    def __init__(self) -> None:
        self._descriptor = os.open(_PROC_STATUS, os.O_RDONLY | os.O_CLOEXEC)
        self._peak = 0
        status = self._status()
        self._highest, self._mapped = _kilobytes(status, b"VmHWM:"), _mapped(status)

    def read(self) -> int:
        status = self._status()
        highest, mapped = _kilobytes(status, b"VmHWM:"), _mapped(status)
        if highest > self._highest:
            self._peak = max(self._peak, (highest - max(mapped, self._mapped)) * 1024)
        self._highest, self._mapped = highest, mapped
        return _kilobytes(status, b"RssAnon:") * 1024

    def exact_peak(self) -> int:
        return self._peak

    def close(self) -> None:
        os.close(self._descriptor)

    def _status(self) -> bytes:
        return os.pread(self._descriptor, _STATUS_BYTES, 0)


def _kilobytes(status: bytes, field: bytes) -> int:
    begin = status.index(field) + len(field)
    return int(status[begin : status.index(b"kB", begin)])


def _mapped(status: bytes) -> int:
    """Resident kilobytes that are not anonymous."""
    return _kilobytes(status, b"RssFile:") + _kilobytes(status, b"RssShmem:")


class PsutilMeter:
    """Unique (or else resident) set size through ``psutil``, for systems without /proc."""

    shortest_ms = 0.0
    keeps_peak = False

    def __init__(self) -> None:
        try:
            import psutil
        except ImportError as error:
            raise MemoryMetricError(
                "memory of this process cannot be measured: /proc/self/status gives no RssAnon and psutil is not "
                "installed; run: pip install psutil"
            ) from error
        self._process = psutil.Process()
        self._field = "uss" if hasattr(self._process.memory_full_info(), "uss") else "rss"
        self.metric = f"psutil.{self._field}"

    def read(self) -> int:
        if self._field == "rss":
            return int(self._process.memory_info().rss)
        return int(self._process.memory_full_info().uss)

    def exact_peak(self) -> int:
        return 0

    def close(self) -> None:
        return


class AcceleratorMeter:
    """Live tensor bytes on one accelerator, as PyTorch's allocator counts them (``torch.<type>.memory_allocated``).

    Creating one resets the allocator's peak, so that ``exact_peak`` belongs to this load alone. A reading builds all of
    the allocator's statistics while it holds the GIL.
    """

    shortest_ms = 20.0
    keeps_peak = True

    def __init__(self, device: torch.device) -> None:
        import torch

        self.metric = f"torch.{device.type}.memory_allocated"
        self._memory = torch.get_device_module(device)
        # The current device is per thread, and another thread takes the readings: 'cuda' becomes 'cuda:3' here.
        self._device = device if ":" in str(device) else torch.device(device.type, self._memory.current_device())
        self._memory.reset_peak_memory_stats(self._device)

    def read(self) -> int:
        return int(self._memory.memory_allocated(self._device))

    def exact_peak(self) -> int:
        return int(self._memory.max_memory_allocated(self._device))

    def close(self) -> None:
        return


def meter_for(device: torch.device | str) -> Meter:
    """The best meter for a model that loads to ``device`` ('cpu', 'cuda:3', ...)."""
    import torch

    resolved = torch.device(device)
    # "mps" shares the host's memory and keeps no allocator statistics of this kind.
    if resolved.type == "cpu" or not hasattr(torch.get_device_module(resolved), "memory_allocated"):
        return host_meter()
    return AcceleratorMeter(resolved)


def host_meter() -> Meter:
    """The best meter of host memory on this system. Needs no torch."""
    if _PROC_STATUS.exists() and b"RssAnon:" in _PROC_STATUS.read_bytes():
        return RssAnonMeter()
    return PsutilMeter()


class MemoryWatch:
    """Measures memory when it is entered and when it is left; then ``usage`` has the result, also after an error.

        with MemoryWatch(meter_for("cuda:0")) as watch:
            load()
        watch.usage.peak_above_start

    The peak is the meter's own, so this is for meters that keep one. It costs two readings and no thread.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._seconds = array("d")
        self._bytes = array("q")
        self._highest = 0
        self._usage: MemoryUsage | None = None

    @property
    def usage(self) -> MemoryUsage:
        """The result.

        Raises:
            RuntimeError: the block is still running.
        """
        if self._usage is None:
            raise RuntimeError(f"{type(self).__name__}.usage is there once the `with` block has ended")
        return self._usage

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._start = self._meter.read()
        self._keep(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._meter.read()
        self._keep(end)
        peak = max(self._highest, self._meter.exact_peak())
        self._meter.close()
        self._usage = MemoryUsage(
            metric=self._meter.metric,
            start=self._start,
            peak_above_start=peak - self._start,
            end_above_start=end - self._start,
            samples=tuple(thin(self._samples(), MAX_SAMPLES)),
        )

    def _keep(self, reading: int) -> None:
        self._highest = max(self._highest, reading)
        self._seconds.append(time.perf_counter() - self._began)
        self._bytes.append(reading)
        if len(self._bytes) >= _BUFFER_SAMPLES:
            self._compact()

    def _compact(self) -> None:
        kept = thin(self._samples(), _BUFFER_SAMPLES // 4)
        self._seconds = array("d", (second for second, _ in kept))
        self._bytes = array("q", (above + self._start for _, above in kept))

    def _samples(self) -> list[Sample]:
        return [
            (round(second, 4), value - self._start) for second, value in zip(self._seconds, self._bytes, strict=True)
        ]


class MemorySampler(MemoryWatch):
    """A watch that also takes samples in between, for the curve and for meters that keep no peak.

    The sampling thread shares the GIL with the load, so a reading takes only tens of microseconds, and a load that
    holds the GIL (one long C call) is sampled late rather than slowed down. Entering and leaving take readings too, so
    even the shortest load has a start and an end.

    Args:
        meter: takes the readings.
        interval_ms: time between readings; the meter's ``shortest_ms`` at least.

    Raises:
        ValueError: the interval is not above 0.
    """

    def __init__(self, meter: Meter, interval_ms: float = DEFAULT_INTERVAL_MS) -> None:
        if interval_ms <= 0:
            raise ValueError(f"interval_ms must be above 0, not {interval_ms}")
        super().__init__(meter)
        self._interval = max(interval_ms, meter.shortest_ms) / 1000
        # Held while the block runs. Waiting for a lock is one C call, for an Event thirty lines of Python.
        self._running = threading.Lock()

    def __enter__(self) -> Self:
        super().__enter__()
        self._running.acquire()
        self._thread = threading.Thread(target=self._watch, name="streamfp8-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.release()
        self._thread.join()
        super().__exit__(kind, error, trace)

    def _watch(self) -> None:
        while not self._running.acquire(timeout=self._interval):
            self._keep(self._meter.read())
        self._running.release()


def thin(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """At most ``limit`` of ``samples`` (ordered by time), with the shape of the curve kept.

    Time is cut into equal windows and each keeps its highest and its lowest sample, so every rise and fall wider than
    a window stays visible. The overall peak and the first and last sample always survive.

    Raises:
        ValueError: ``limit`` is below 4.
    """
    if limit < 4:
        raise ValueError(f"limit must be 4 or more (first, last, highest, lowest), not {limit}")
    if len(samples) <= limit:
        return list(samples)
    windows = (limit - 2) // 2
    begin = samples[0][0]
    width = (samples[-1][0] - begin) / windows
    highest: dict[int, int] = {}
    lowest: dict[int, int] = {}
    for index, (second, value) in enumerate(samples):
        window = min(int((second - begin) / width), windows - 1) if width > 0 else 0
        if value > samples[highest.setdefault(window, index)][1]:
            highest[window] = index
        if value < samples[lowest.setdefault(window, index)][1]:
            lowest[window] = index
    kept = {0, len(samples) - 1, *highest.values(), *lowest.values()}
    return [samples[index] for index in sorted(kept)]
