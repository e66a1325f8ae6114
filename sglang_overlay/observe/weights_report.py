# SPDX-License-Identifier: Apache-2.0
"""What a rank tells of the weights that it serves: their checksum, and what updates have made of them.

Sizes are bytes, times are seconds. The JSON is an entry of ``internal_states`` in ``/server_info``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sglang_overlay.observe.report import Ranks, Role

STATE = "streamfp8_weights"
"""The entry; also the ``action`` of ``/weights_checker`` that has all ranks compute their checksums anew."""
SESSION = "session"
"""The kind of an update of several calls; all others are those of their only call."""
MAX_NAMES = 20
"""Names of parameters that the JSON lists."""


@dataclass(frozen=True)
class UpdateReport:
    """One update on one rank.

    Attributes:
        kind: ``disk``, ``tensors``, ``buckets``, ``direct``, ``broadcast``, ``ipc``, or ``session`` of several calls.
        seconds: from its begin to its end; of a session, with what the trainer did in between.
        failure: why everything was undone; None after a success.
        calls: number of calls that were part of it, by kind.
        failed_calls: how many of them were undone.
        units: quantization units that hold new values.
        all_units: quantization units of the model.
        bytes: memory that was overwritten, once for each call that did.
        untouched: parameters that a complete checkpoint would have replaced, but this update did not, or only in part.
    """

    kind: str
    seconds: float = 0.0
    failure: str | None = None
    calls: Mapping[str, int] = field(default_factory=dict)
    failed_calls: int = 0
    units: int = 0
    all_units: int = 0
    bytes: int = 0
    untouched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checksum:
    """A checksum of what one model of one rank serves.

    Attributes:
        total: 16 hexadecimal digits; equal for equal weights, whatever way they came.
        layers: the same for each layer, in the model's order.
        bytes: that were read to compute it.
        seconds: that it took.
    """

    total: str
    layers: Mapping[str, str]
    bytes: int
    seconds: float

    @property
    def number(self) -> int:
        """The first 48 bits, which a metric's floating-point number holds exactly."""
        return int(self.total[:12], 16)


@dataclass(frozen=True)
class WeightsReport:
    """The weights of one model on one rank.

    Attributes:
        role: of the model.
        ranks: of the process.
        checksum: after the last load or update; None if it could not be computed.
        updates: number of updates that succeeded, by kind.
        failed_updates: number of updates that failed, by kind.
        last_update: None before the first.
    """

    role: Role
    ranks: Ranks
    checksum: Checksum | None = None
    updates: Mapping[str, int] = field(default_factory=dict)
    failed_updates: Mapping[str, int] = field(default_factory=dict)
    last_update: UpdateReport | None = None


def to_json(report: WeightsReport) -> dict[str, Any]:
    """``report`` as plain JSON data, without the checksums of layers."""
    checksum, update = report.checksum, report.last_update
    return {
        "role": report.role,
        "ranks": asdict(report.ranks),
        "checksum": None if checksum is None else checksum.total,
        "checksum_seconds": None if checksum is None else checksum.seconds,
        "checksum_bytes": None if checksum is None else checksum.bytes,
        "updates": dict(report.updates),
        "failed_updates": dict(report.failed_updates),
        "last_update": None if update is None else _update(update),
    }


def layers_to_json(report: WeightsReport) -> dict[str, Any]:
    """``to_json``, with the checksums of layers."""
    return {**to_json(report), "layers": {} if report.checksum is None else dict(report.checksum.layers)}


def _update(update: UpdateReport) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(update).items() if name != "untouched"},
        "calls": dict(update.calls),
        "untouched": {"parameters": len(update.untouched), "names": list(update.untouched[:MAX_NAMES])},
    }
