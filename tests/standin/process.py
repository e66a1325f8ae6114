# SPDX-License-Identifier: Apache-2.0
"""Makes this process one that has the stand-in GPU of its environment. Before SGLang is imported."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from standin import aten, packages
from standin.gpus import GPUS


def install() -> None:
    """Run torch's CUDA operators on the CPU, and answer for packages and kernels of a GPU machine."""
    gpu = GPUS[os.environ["STANDIN_GPU"]]
    warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
    aten.install()
    packages.install()
    for name in ("init_process_group", "new_group"):
        original = getattr(torch.distributed, name)
        setattr(torch.distributed, name, _over_gloo(original))
    if gpu.architecture:
        from standin import rocm

        rocm.install(gpu)


def _over_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL's ranks have a GPU each; gloo takes device memory too, which it copies."""

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "nccl" in str(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        return original(*args, **kwargs)

    return called
