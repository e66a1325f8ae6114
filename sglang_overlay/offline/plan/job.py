# SPDX-License-Identifier: Apache-2.0
"""What is planned and what comes of it: plain data, which goes from one process to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglang_overlay.offline.plan.host import HostMemory
from sglang_overlay.schemes.choice import SchemeChoice

Mode = Literal["stock", "layers", "streaming"]
"""How fp8 comes about: after everything is loaded (``stock``); a whole layer at a time, as soon as all of it has come
(``layers``: vLLM's layerwise loading, SGLang's PR #17945); a quantization unit at a time (``streaming``, this
package)."""

MODES: tuple[Mode, ...] = ("stock", "layers", "streaming")

Order = Literal["sorted", "staggered", "shuffled"]
"""How checkpoint files follow one another; see ``Checkpoint.read_by``."""

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
        dp: ``--dp-size``; with ``dp_attention`` a part of the TP ranks, else whole copies, each of which is as one.
        dp_attention: ``--enable-dp-attention``.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    dp_attention: bool = False

    @property
    def ranks(self) -> int:
        """Processes that load together."""
        return self.tp * self.pp


@dataclass
class DeviceWork:
    """What a load asks of a device beside memory.

    Attributes:
        launches: operations that run on the device, a launch each, copies within it included; a kernel of SGLang's
            counts as many as it launches.
        uploads: copies from the host.
        waits: for the device, by the host: its numbers, and copies to the host.
    """

    launches: int = 0
    uploads: int = 0
    waits: int = 0


@dataclass(frozen=True)
class Job:
    """One load of one rank.

    Attributes:
        model: folder with ``config.json``, and the checkpoint's headers unless these come from the configuration alone.
        rank: ``pp_rank * tp + tp_rank``.
        device: what is modelled. ``cuda``: allocations on a GPU, the checkpoint in host memory. ``cpu``: memory written
            to (``RssAnon``), the checkpoint in files that are mapped.
        from_config: take names and shapes from ``config.json`` although there are headers.
        schemes: as ``SGLANG_STREAMFP8_SCHEME`` says; stock SGLang knows only its own.
        server_args: further fields of SGLang's ``ServerArgs``.
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


@dataclass(frozen=True)
class PlannedLoad:
    """What one rank needs in one mode. Sizes are bytes.

    Attributes:
        peak: the most memory at once.
        final: of the loaded model's tensors.
        staging_peak: the most high-precision memory at once for units, or layers, that had not come completely.
        units: quantization units; layers in mode ``layers``.
        direct_units: of these, how many came whole from one checkpoint tensor.
        streamed, deferred, fallback: layers by the way they take (see the load report).
        why_none: why the whole model is loaded as stock does, if so.
        checkpoint_bytes, checkpoint_parameters, checkpoint_files: of what every rank reads.
        checkpoint_source: where names and shapes come from.
        samples: memory over the bytes read; what follows the last tensor is at the last position.
        host: what is read needs of host memory, beside the above.
        work: what else is asked of the device.
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
