# SPDX-License-Identifier: Apache-2.0
"""What a rank serves, for those who have to trust it: a checksum of it, and what updates have made of it."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import MappingProxyType

import torch

from sglang_overlay.core.checksum import checksums
from sglang_overlay.load.model_tensors import TensorHolders
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.observe.report import Role
from sglang_overlay.observe.weights_report import Checksum, UpdateReport, WeightsReport

_DIGEST_BYTES = 8


class ServedWeights:
    """The weights of one model of this process.

    Args:
        model: just loaded, and not used yet. Tensors that it makes later are no weights.
        role: of the model.

    Attributes:
        checksum: of the weights when it was last computed; None before, and where that failed.
        last_update: the update that ended last, whatever became of it.
    """

    def __init__(self, model: torch.nn.Module, role: Role) -> None:
        self.checksum: Checksum | None = None
        self.last_update: UpdateReport | None = None
        self._role = role
        self._ranks = parallel_ranks()
        self._holders = TensorHolders(model)
        self._updates: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def note(self, update: UpdateReport) -> None:
        """An update has ended."""
        self.last_update = update
        (self._updates if update.failure is None else self._failures)[update.kind] += 1

    def compute_checksum(self) -> None:
        """Compute the checksum of what is served now; on the tensors' devices, which this waits for.

        After an error there is none.
        """
        self.checksum = None
        began = time.perf_counter()
        layers: defaultdict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        seen = set()
        for name, tensor in self._holders.tensors():
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if not tensor.is_meta and memory not in seen:
                layers[layer_of(name)].append((name, tensor))
                # Tied weights, and others that a model holds twice, are read once.
                seen.add(memory)
        values = checksums([tensor for _, tensor in held] for held in layers.values())
        digests = {
            layer: _digest([f"{value:016x}", *(f"{name} {one.dtype} {tuple(one.shape)}" for name, one in held)])
            for (layer, held), value in zip(layers.items(), values, strict=True)
        }
        self.checksum = Checksum(
            total=_digest([f"{layer} {digest}" for layer, digest in sorted(digests.items())]),
            layers=digests,
            bytes=sum(tensor.nbytes for held in layers.values() for _, tensor in held),
            seconds=time.perf_counter() - began,
        )

    @property
    def report(self) -> WeightsReport:
        """What there is to tell."""
        return WeightsReport(
            role=self._role,
            ranks=self._ranks,
            checksum=self.checksum,
            updates=MappingProxyType(dict(self._updates)),
            failed_updates=MappingProxyType(dict(self._failures)),
            last_update=self.last_update,
        )


def layer_of(name: str) -> str:
    """The layer that a tensor is told as a part of: up to the first number in its name, else its module."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1]) or name


def _digest(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=_DIGEST_BYTES).hexdigest()
