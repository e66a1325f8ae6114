# SPDX-License-Identifier: Apache-2.0
"""Entry of ``python -m sglang_overlay``."""

from sglang_overlay.cli import main

main(prog_name="python -m sglang_overlay")
