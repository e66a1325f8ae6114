# SPDX-License-Identifier: Apache-2.0
"""Set up SGLang in a process of this package that plans or exports, and does not serve."""

from __future__ import annotations

import importlib

from sglang_overlay.settings import CPU_REFERENCE_VARIABLE, MODE_VARIABLE, REPORT_VARIABLE, SCHEME_VARIABLE

ENVIRON = {
    "CUDA_VISIBLE_DEVICES": "",
    "SGLANG_PLUGINS": "",
    CPU_REFERENCE_VARIABLE: "1",
    MODE_VARIABLE: "1",
    REPORT_VARIABLE: "",
    SCHEME_VARIABLE: "",
}
"""To be set before SGLang is imported: hides GPUs, puts the hooks in place, and resets all other settings."""


def load_plugins() -> None:
    """Import SGLang with its plugins loaded, before modules that import names which plugins patch."""
    # First, as SGLang's programs do: applying hooks inspects it, and must not find it half imported.
    importlib.import_module("sglang.srt.server_args")
    from sglang.srt import plugins

    plugins.load_plugins()
