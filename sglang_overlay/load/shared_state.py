# SPDX-License-Identifier: Apache-2.0
"""What each rank of a server publishes, for all others to read at any time.

Through the store of torch's process group, so without a collective: a rank that hangs, or is in another pipeline stage
and later, keeps nobody waiting.
"""

from __future__ import annotations

import json
from typing import Any

import torch

_PREFIX = "streamfp8/"


def publish(name: str, value: Any) -> None:
    """Publish ``value``, which JSON can hold, in place of what this rank published under ``name`` before."""
    store = _store()
    if store is not None:
        store.set(_key(name, torch.distributed.get_rank()), json.dumps(value))


def published(name: str) -> list[Any]:
    """What the ranks have published last, in the order of ranks, without those that have published nothing."""
    store = _store()
    keys = [] if store is None else [_key(name, rank) for rank in range(torch.distributed.get_world_size())]
    return [json.loads(store.get(key)) for key in keys if store.check([key])]


def _key(name: str, rank: int) -> str:
    return f"{_PREFIX}{name}/{rank}"


def _store() -> Any:
    """The store of the process group; None where there is no group."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
