# SPDX-License-Identifier: Apache-2.0
"""Memory of GPUs; the facts and their sources are in ``gpus.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from sglang_overlay.errors import StreamFP8Error


class UnknownGPUError(StreamFP8Error):
    """A GPU of which this package does not know the memory."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory: bytes that ``nvidia-smi`` gives as its total.
        usable: bytes of it that weights may take.
    """

    name: str
    memory: int
    usable: int


@cache
def known() -> tuple[GPU, ...]:
    """All GPUs in the table, in its order."""
    table = json.loads(resources.files(__package__).joinpath("gpus.json").read_text(encoding="utf-8"))
    sizes = {entry["name"]: entry["memory_mib"] << 20 for entry in table["gpus"]}
    return tuple(GPU(name, size, int(size * table["usable_fraction"])) for name, size in sizes.items())


def find(name: str) -> GPU:
    """The GPU of that name, in upper or lower case.

    Raises:
        UnknownGPUError: there is none; the message lists those there are.
    """
    for gpu in known():
        if gpu.name.lower() == name.lower():
            return gpu
    raise UnknownGPUError(f"no GPU {name!r} in the table; known: {', '.join(gpu.name for gpu in known())}")
