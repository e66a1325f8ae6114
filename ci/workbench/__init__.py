"""Checkpoints, real SGLang loads and serving runs shared by the tests, the demo and the benchmarks.

Without an accelerator, all of it runs on the CPU reference platform, so this module switches that on for this process
and those it starts.
"""

import os

from sglang_overlay.settings import CPU_REFERENCE_VARIABLE

os.environ.setdefault(CPU_REFERENCE_VARIABLE, "1")
