# SPDX-License-Identifier: Apache-2.0
"""Python runs this in each process that has this folder on its path: those of :func:`standin.gpus.environ`."""

import os
import sys
from pathlib import Path

if "STANDIN_GPU" in os.environ:
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from standin import process

    process.install()
