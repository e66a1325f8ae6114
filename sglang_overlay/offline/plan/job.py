# SPDX-License-Identifier: Apache-2.0
"""Jobs of the planner and their results: plain data, which processes exchange."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.host import HostMemory
from sglang_overlay.schemes.choice import SchemeChoice

Mode = Literal["stock", "layers", "complete_layers", "streaming"]
"""When weights are quantized: after everything is loaded (``stock``); one layer at a time, as soon as all of it has
been read, held on the device from its first tensor on (``layers``: vLLM #31914, SGLang #17945) or only then
(``complete_layers``: vLLM 0.33, which keeps the arguments of its weight loaders until then); one unit at a time
(``streaming``, this package)."""

MODES: tuple[Mode, ...] = ("stock", "layers", "complete_layers", "streaming")

WHOLE_LAYERS: tuple[Mode, ...] = ("layers", "complete_layers")
"""The modes that hold layers, for comparison."""

Order = Literal["sorted", "staggered", "shuffled"]
"""Order of checkpoint files; see ``Checkpoint.read_by``."""

ORDERS: tuple[Order, ...] = ("sorted", "staggered", "shuffled")

Device = Literal["cuda", "cpu"]

Sample = tuple[int, int]
"""Bytes of the checkpoint read so far, bytes of memory."""


@dataclass(frozen=True)
class Layout:
    """How a server's ranks divide a model, by the names of its options.

    Attributes:
        tp: ``--tp-size``.
        ep: ``--ep-size``.
        pp: ``--pp-size``.
        dp: ``--dp-size``; with ``dp_attention`` the TP ranks are divided, else each replica is as a single one.
        dp_attention: ``--enable-dp-attention``.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    dp_attention: bool = False

    @property
    def ranks(self) -> int:
        """Number of processes that load together."""
        return self.tp * self.pp


@dataclass
class DeviceWork:
    """A load's work on a device.

    Attributes:
        launches: operations that run on the device, one launch each, including copies within it; SGLang's functions
            count the kernels they launch.
        uploads: copies from the host.
        waits: how often the host waits for the device: for numbers, and for copies to the host.
    """

    launches: int = 0
    uploads: int = 0
    waits: int = 0

    def add(self, other: DeviceWork) -> None:
        """Count ``other`` as well."""
        self.launches += other.launches
        self.uploads += other.uploads
        self.waits += other.waits

    def minus(self, before: DeviceWork) -> DeviceWork:
        """What has been counted since ``before``."""
        return DeviceWork(self.launches - before.launches, self.uploads - before.uploads, self.waits - before.waits)


@dataclass(frozen=True)
class Job:
    """One load of one rank.

    Attributes:
        model: folder with ``config.json`` and, unless the configuration is enough, the checkpoint's headers.
        rank: ``pp_rank * tp + tp_rank``.
        device: what is modelled. ``cuda``: allocations on a GPU, with the checkpoint in host memory. ``cpu``: memory
            written to (``RssAnon``), with the checkpoint in mapped files.
        from_config: take names and shapes from ``config.json`` even if there are headers.
        schemes: as for ``SGLANG_STREAMFP8_SCHEME``; mode ``stock`` ignores them.
        server_args: further fields of SGLang's ``ServerArgs``.
        gpus: those for which to plan what is left for serving.
    """

    model: Path
    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    mode: Mode = "streaming"
    order: Order = "sorted"
    device: Device = "cuda"
    from_config: bool = False
    schemes: SchemeChoice = field(default_factory=SchemeChoice)
    server_args: tuple[tuple[str, Any], ...] = ()
    gpus: tuple[GPU, ...] = ()


@dataclass(frozen=True)
class Serving:
    """What a rank can serve once the model is loaded.

    Attributes:
        gpu: name of the rank's.
        mem_fraction_static: as given, or SGLang's own for this GPU.
        tokens: of KV cache (SGLang's ``max_total_num_tokens``); 0 if it serves nothing.
        requests: that run at the same time at most (``max_running_requests``).
        context_length: tokens of the longest request that the model takes.
        why_none: why there are no tokens: SGLang's error, or that it has no kernels for this GPU.
    """

    gpu: str
    mem_fraction_static: float
    tokens: int
    requests: int
    context_length: int
    why_none: str | None = None

    def serves(self, context_length: int | None = None) -> bool:
        """Whether a request of so many tokens fits, by default the longest that the model takes."""
        return self.tokens >= (context_length or self.context_length)


@dataclass(frozen=True)
class PlannedLoad:
    """What one rank needs in one mode. Sizes are bytes.

    Attributes:
        peak: peak memory.
        final: memory of the loaded model's tensors.
        staging_peak: peak high-precision memory for incomplete units, or layers.
        units: quantization units; layers in the modes of whole layers.
        direct_units: how many of these came whole from one checkpoint tensor.
        streamed, deferred, fallback: numbers of layers by how they are loaded (see the load report).
        why_none: the reason if the whole model is loaded as in stock.
        checkpoint_bytes, checkpoint_parameters, checkpoint_files: of the checkpoint that every rank reads.
        checkpoint_source: where names and shapes come from.
        samples: memory over the bytes read; all after the last tensor is at the last position.
        host: host memory for reading, in addition to the above.
        work: the device's other work.
        serving: what is left for serving, for each of the job's GPUs.
    """

    mode: Mode
    rank: int
    peak: int
    final: int
    staging_peak: int
    units: int
    direct_units: int
    streamed: int
    deferred: int
    fallback: int
    why_none: str | None
    checkpoint_bytes: int
    checkpoint_parameters: int
    checkpoint_files: int
    checkpoint_source: str
    architecture: str
    samples: tuple[Sample, ...]
    host: HostMemory
    work: DeviceWork
    serving: tuple[Serving, ...] = ()

    def serving_on(self, gpu: GPU) -> Serving | None:
        """What is left on this GPU, if that was planned."""
        return next((found for found in self.serving if found.gpu == gpu.name), None)
