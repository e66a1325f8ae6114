# SPDX-License-Identifier: Apache-2.0
"""Keep placeholders as they are where a model moves its modules while it is built.

Some models build a part in another dtype than the rest, and move it then: ``merger.to(device=..., dtype=...)`` of
minicpmv.py. In stock its weights are on that device already, and at most their dtype changes. A tensor without memory
cannot be moved, so such a move gets a kernel of its own for the meta device, as in ``bypass_capture.py``. Its result
has no memory either, and is known to stand for the placeholder.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from sglang_overlay.core.bypass_capture import NO_DATA, meta_kernels
from sglang_overlay.core.capture import storage_key


@dataclass(frozen=True)
class _Storage:
    """Of a placeholder, or of what it has been moved to.

    Attributes:
        tensor: keeps the storage, so that its key is not given to another one.
        device: where the weight is in stock.
        first: key of the storage that the placeholder was made with.
    """

    tensor: torch.Tensor
    device: torch.device
    first: int


class MovedPlaceholders(AbstractContextManager[None]):
    """While it is entered, a placeholder can be moved to the device that it belongs on, and get another dtype."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}
        self._kernels = ExitStack()

    def add(self, placeholder: torch.Tensor, device: torch.device) -> None:
        """Let ``placeholder``, which belongs on ``device``, be moved."""
        key = storage_key(placeholder)
        self._storages[key] = _Storage(placeholder.data, _with_index(device), key)

    def first_key(self, tensor: torch.Tensor) -> int:
        """Key of the storage that a tensor had before it was moved, if it is a placeholder, else of its own."""
        key = storage_key(tensor)
        return self._storages[key].first if key in self._storages else key

    def clear(self) -> None:
        """Forget all placeholders."""
        self._storages.clear()

    def __enter__(self) -> None:
        self._kernels.enter_context(meta_kernels({"_to_copy": self._to_copy}))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kernels.close()

    def _to_copy(
        self,
        tensor: torch.Tensor,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        # Torch comes here with tensors without memory, and with others that are moved to the meta device.
        known = self._storages.get(storage_key(tensor)) if tensor.is_meta else None
        if device is not None and device.type != "meta" and (known is None or _with_index(device) != known.device):
            raise NotImplementedError(NO_DATA)
        if known is not None and dtype in (None, tensor.dtype):
            # In stock nothing would happen, and views of the weight would stay such.
            return tensor.detach()
        made: torch.Tensor = torch.ops.aten.empty_like(tensor, dtype=dtype, device=torch.device("meta"), **options)
        if known is not None:
            self._storages[storage_key(made)] = _Storage(made, known.device, known.first)
        return made


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` is the current device."""
    return torch.empty(0, device=device).device
