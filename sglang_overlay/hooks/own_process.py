# SPDX-License-Identifier: Apache-2.0
"""SGLang in a process of this package's own, which plans or exports and serves nothing."""

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
"""To be set before SGLang is imported: on any machine no GPU is seen, hooks are in place, nothing else is asked for."""


def load_plugins() -> None:
    """Import SGLang with its plugins loaded, before modules that take names from those which plugins patch."""
    # First, as its own programs do: applying hooks looks into it, and must not find it half imported.
    importlib.import_module("sglang.srt.server_args")
    from sglang.srt import plugins

    plugins.load_plugins()
