# SPDX-License-Identifier: Apache-2.0
"""Capture writes in weight updates, where only some of a model's weights are written."""

from __future__ import annotations

from typing import Any

import torch

from sglang_overlay.core.capture import WriteCapture


class PartialCapture(WriteCapture):
    """A ``WriteCapture`` for when only some of the placeholders will be written.

    A tensor that upstream computes from an unwritten placeholder has no data. Its weight has not changed, so copying
    it leaves the destination as it is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and _has_no_data(args[1]) and not args[0].is_meta:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


def _has_no_data(value: Any) -> bool:
    # copy_ may also get a plain number.
    return isinstance(value, torch.Tensor) and value.is_meta
