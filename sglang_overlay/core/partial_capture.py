# SPDX-License-Identifier: Apache-2.0
"""Catch what weight loaders write where only some of a model's weights are written: in weight updates."""

from __future__ import annotations

from typing import Any

import torch

from sglang_overlay.core.capture import WriteCapture


class PartialCapture(WriteCapture):
    """As ``WriteCapture``, where only a part of the placeholders is going to be written.

    What upstream computes from a placeholder that is not written has no data, and the weight it belongs to has not
    changed: a copy of it leaves its destination as it is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and _has_no_data(args[1]) and not args[0].is_meta:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


def _has_no_data(value: Any) -> bool:
    # A number that is copied comes as the number it is.
    return isinstance(value, torch.Tensor) and value.is_meta
