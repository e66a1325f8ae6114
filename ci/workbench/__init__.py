"""Checkpoints, real SGLang loads and serving runs shared by the tests, the demo and the benchmarks.

All of it runs on the CPU reference platform where there is no accelerator, so that is asked for here, for this process
and those it starts.
"""

import os

from sglang_overlay.settings import CPU_REFERENCE_VARIABLE

os.environ.setdefault(CPU_REFERENCE_VARIABLE, "1")
