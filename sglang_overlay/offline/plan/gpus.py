# SPDX-License-Identifier: Apache-2.0
"""Memory of GPUs; the facts and their sources are in ``gpus.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from sglang_overlay.errors import StreamFP8Error


class UnknownGPUError(StreamFP8Error):
    """This package does not know the memory of this GPU."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory: total bytes, as ``nvidia-smi`` shows them.
        usable: bytes of those that weights may take.
        capability: major and minor compute capability.
        taken_alone, taken_among_ranks: bytes that are taken before anything is loaded, by a single rank or by one of
            several.
    """

    name: str
    memory: int
    usable: int
    capability: tuple[int, int]
    taken_alone: int = 0
    taken_among_ranks: int = 0

    @property
    def serves_experts(self) -> bool:
        """Whether SGLang serves fp8 experts on it: its Triton kernels need compute capability 8.9 for e4m3."""
        return self.capability >= (8, 9)


@cache
def known() -> tuple[GPU, ...]:
    """All GPUs in the table, in its order."""
    table = json.loads(resources.files(__package__).joinpath("gpus.json").read_text(encoding="utf-8"))
    return tuple(_gpu(entry, table) for entry in table["gpus"])


def _gpu(entry: dict[str, Any], table: dict[str, Any]) -> GPU:
    memory, taken = entry["memory_mib"] << 20, table["before_loading"]
    return GPU(
        entry["name"],
        memory,
        int(memory * table["usable_fraction"]),
        tuple(entry["capability"]),
        taken["alone_mib"] << 20,
        taken["among_ranks_mib"] << 20,
    )


def find(name: str) -> GPU:
    """The GPU of that name, ignoring case.

    Raises:
        UnknownGPUError: there is none; the message lists the known ones.
    """
    for gpu in known():
        if gpu.name.lower() == name.lower():
            return gpu
    raise UnknownGPUError(f"no GPU {name!r} in the table; known: {', '.join(gpu.name for gpu in known())}")
