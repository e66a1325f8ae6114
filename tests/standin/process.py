# SPDX-License-Identifier: Apache-2.0
"""Makes this process one that has the stand-in GPU of its environment. Before SGLang is imported."""

from __future__ import annotations

import os
import warnings

from standin import aten, packages
from standin.gpus import GPUS


def install() -> None:
    """Run torch's CUDA operators on the CPU, and answer for packages and kernels of a GPU machine."""
    gpu = GPUS[os.environ["STANDIN_GPU"]]
    warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
    aten.install()
    packages.install()
    if gpu.architecture:
        from standin import rocm

        rocm.install(gpu)
