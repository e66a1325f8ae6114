# SPDX-License-Identifier: Apache-2.0
"""Say what streaming held when memory ran out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch

from sglang_overlay.core.load_errors import StagingMemoryError
from sglang_overlay.core.staging import StagingAccount

_SHORTAGES = ("can't allocate memory", "can't start new thread", "Cannot allocate memory")


def is_shortage(error: BaseException) -> bool:
    """Whether torch, the system or Python says with this error that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _SHORTAGES)


def shortage_explained(purpose: str, size: int, account: StagingAccount) -> AbstractContextManager[None]:
    """Turn a memory shortage into an error that says what was needed and what streaming had allocated.

    Args:
        purpose: what the memory is for, with the parameter's name.
        size: bytes needed.
        account: the load's staging account.

    Raises:
        StagingMemoryError: memory ran out inside the block; caused by torch's error.
    """
    return _Explanation(purpose, size, account)


class _Explanation(AbstractContextManager[None]):
    """A class, since a generator would double the time a small tensor takes."""

    __slots__ = ("_account", "_purpose", "_size")

    def __init__(self, purpose: str, size: int, account: StagingAccount) -> None:
        self._purpose = purpose
        self._size = size
        self._account = account

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and is_shortage(error):
            needed = f"{_mib(self._size)} were needed {self._purpose}"
            raise StagingMemoryError(f"memory ran out: {needed}. {memory_note(self._account)}") from error


def memory_note(account: StagingAccount) -> str:
    """A message: what streaming has allocated, and what the user can do about it."""
    return (
        f"Streaming had allocated {_mib(account.stored)} of fp8 weights and scales, and held {_mib(account.held)} of "
        f"staging (at most {_mib(account.peak)} so far). Leave more memory to this process, or spread the model over "
        "more ranks (--tp-size, --pp-size, --ep-size)."
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
