# SPDX-License-Identifier: Apache-2.0
"""SGLang's LoRA pins host memory whether or not there is a GPU to pin it for, and then fails: here nothing is pinned.

SGLang imports this as an external model package.
"""

from __future__ import annotations

import functools

import torch


def _unpinned(make):
    @functools.wraps(make)
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made


for _name in ("arange", "empty", "tensor", "zeros"):
    setattr(torch, _name, _unpinned(getattr(torch, _name)))
torch.Tensor.pin_memory = lambda self, *args: self
