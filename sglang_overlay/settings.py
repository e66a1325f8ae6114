# SPDX-License-Identifier: Apache-2.0
"""The environment variables of this package, and its part of ``--model-loader-extra-config``.

They are read in this module and nowhere else.

========================== ============================ ===========================================================
variable                   values                       meaning
========================== ============================ ===========================================================
``SGLANG_STREAMFP8``       ``1`` (default)              stream fp8 loads
..                         ``0``                        stock behaviour exactly
..                         ``require``                  an fp8 load that cannot be streamed is an error
``SGLANG_STREAMFP8_REPORT`` a folder                    write one JSON load report per rank there
``SGLANG_STREAMFP8_ALLOW_MISSING`` ``0`` (default)      weights that the checkpoint lacks are an error
..                         ``1``                        they are a warning, and zero in the model
``SGLANG_STREAMFP8_SCHEME`` ``stock`` (default)         quantize as stock SGLang does
..                         a scheme's name, or JSON     quantize otherwise (``schemes/choice.py``)
``SGLANG_STREAMFP8_PINNED_RING`` ``0`` (default)        CUDA copies out of the checkpoint's own memory
..                         ``1``                        through pinned memory, beside the loader; not yet run on a GPU
``SGLANG_STREAMFP8_CPU_REFERENCE`` ``0`` (default)      without an accelerator SGLang fails, as without this package
..                         ``1``                        it serves on the CPU reference platform (``cpu_reference/``)
========================== ============================ ===========================================================

``{"streamfp8": {"scheme": ...}}`` in ``--model-loader-extra-config`` is the same choice as ``SGLANG_STREAMFP8_SCHEME``;
``--quantization fp8_block`` is written there too (``hooks/option_hooks.py``).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_overlay.errors import SettingsError
from sglang_overlay.schemes.choice import FLAGS, SchemeChoice, parse

MODE_VARIABLE = "SGLANG_STREAMFP8"
REPORT_VARIABLE = "SGLANG_STREAMFP8_REPORT"
ALLOW_MISSING_VARIABLE = "SGLANG_STREAMFP8_ALLOW_MISSING"
SCHEME_VARIABLE = "SGLANG_STREAMFP8_SCHEME"
PINNED_RING_VARIABLE = "SGLANG_STREAMFP8_PINNED_RING"
CPU_REFERENCE_VARIABLE = "SGLANG_STREAMFP8_CPU_REFERENCE"
VARIABLES = (
    MODE_VARIABLE,
    REPORT_VARIABLE,
    ALLOW_MISSING_VARIABLE,
    SCHEME_VARIABLE,
    PINNED_RING_VARIABLE,
    CPU_REFERENCE_VARIABLE,
)
LOADER_OPTION = "--model-loader-extra-config"
LOADER_KEY = "streamfp8"
"""This package's part of that option's JSON."""


class Mode(enum.Enum):
    """Whether fp8 loads are streamed; members' values are those of ``SGLANG_STREAMFP8``."""

    OFF = "0"
    ON = "1"
    REQUIRE = "require"


@dataclass(frozen=True)
class Settings:
    """What the user asked for, validated.

    Attributes:
        scheme_option: the option that chooses the schemes, with its value, where the variable does not.
    """

    mode: Mode = Mode.ON
    report_folder: Path | None = None
    allow_missing: bool = False
    schemes: SchemeChoice = field(default_factory=SchemeChoice)
    pinned_ring: bool = False
    cpu_reference: bool = False
    scheme_option: str = ""

    @property
    def required_by(self) -> str | None:
        """The setting, with its value, under which an fp8 load that cannot be streamed is an error."""
        if not self.schemes.is_stock:
            return self.scheme_option or f"{SCHEME_VARIABLE}={'/'.join(sorted(self.schemes.names))}"
        return f"{MODE_VARIABLE}={self.mode.value}" if self.mode is Mode.REQUIRE else None


def load_settings(environ: Mapping[str, str], loader_config: Mapping[str, Any] | None = None) -> Settings:
    """Read and validate the settings.

    Args:
        environ: usually ``os.environ``.
        loader_config: the value of ``--model-loader-extra-config``, of which only ``streamfp8`` is read.

    Raises:
        SettingsError: a variable or key has an unknown name or value, and the message lists the valid ones; or the two
            choose different schemes.
    """
    links = _service_links(environ)
    unknown = sorted(
        name for name in environ if name.startswith(MODE_VARIABLE) and name not in VARIABLES and name not in links
    )
    if unknown:
        raise SettingsError(f"there is no setting {unknown[0]}. Use one of: {', '.join(VARIABLES)}.")
    found = Settings(
        mode=_mode(environ.get(MODE_VARIABLE, "")),
        report_folder=_folder(environ.get(REPORT_VARIABLE, "")),
        allow_missing=_switch(ALLOW_MISSING_VARIABLE, environ.get(ALLOW_MISSING_VARIABLE, "")),
        schemes=parse(environ.get(SCHEME_VARIABLE, ""), SCHEME_VARIABLE),
        pinned_ring=_switch(PINNED_RING_VARIABLE, environ.get(PINNED_RING_VARIABLE, "")),
        cpu_reference=_switch(CPU_REFERENCE_VARIABLE, environ.get(CPU_REFERENCE_VARIABLE, "")),
    )
    if found.mode is Mode.OFF and not found.schemes.is_stock:
        raise SettingsError(
            f"{SCHEME_VARIABLE} is set, which only streaming can serve, and {MODE_VARIABLE}=0 switches that off. "
            "Unset one of them."
        )
    return _with_option(found, environ, loader_config or {})


def _with_option(settings: Settings, environ: Mapping[str, str], loader_config: Mapping[str, Any]) -> Settings:
    """The settings with the schemes that a server's option chooses, if it does."""
    if LOADER_KEY not in loader_config:
        return settings
    given = loader_config[LOADER_KEY]
    if not isinstance(given, dict) or set(given) != {"scheme"}:
        raise SettingsError(f'"{LOADER_KEY}" in {LOADER_OPTION} is {given!r}. Its one key is "scheme".')
    scheme = given["scheme"] if isinstance(given["scheme"], str) else json.dumps(given["scheme"])
    chosen = parse(scheme, f"{LOADER_OPTION} {LOADER_KEY}.scheme")
    flag = f"fp8_{chosen.text}"
    option = f"--quantization {flag}" if flag in FLAGS else f"{LOADER_OPTION} {LOADER_KEY}.scheme={chosen.text}"
    if environ.get(SCHEME_VARIABLE, "").strip() and settings.schemes != chosen:
        raise SettingsError(
            f"{option} and {SCHEME_VARIABLE}={settings.schemes.text} choose different schemes. Give one of them."
        )
    return replace(settings, schemes=chosen, scheme_option=option)


def _service_links(environ: Mapping[str, str]) -> set[str]:
    """Variables that Kubernetes sets in every pod for each service of the namespace, named after the service.

    A service ``sglang-streamfp8`` is ``SGLANG_STREAMFP8_SERVICE_HOST``, ``SGLANG_STREAMFP8_PORT`` and more.
    """
    services = [name.removesuffix("_SERVICE_HOST") for name in environ if name.endswith("_SERVICE_HOST")]
    begin = tuple(f"{service}_{kind}" for service in services for kind in ("SERVICE_", "PORT"))
    return {name for name in environ if name.startswith(begin)}


def _mode(text: str) -> Mode:
    text = text.strip().lower()
    if not text:
        return Mode.ON
    try:
        return Mode(text)
    except ValueError:
        valid = ", ".join(f"{MODE_VARIABLE}={mode.value}" for mode in Mode)
        raise SettingsError(f"{MODE_VARIABLE}={text!r} is not a known value. Use one of: {valid}.") from None


def _switch(variable: str, text: str) -> bool:
    text = text.strip()
    if text in ("", "0"):
        return False
    if text == "1":
        return True
    raise SettingsError(f"{variable}={text!r} is not a known value. Use one of: {variable}=0, {variable}=1.")


def _folder(text: str) -> Path | None:
    return Path(text) if text.strip() else None
