# SPDX-License-Identifier: Apache-2.0
"""The environment variables of this package, read in this module and nowhere else.

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
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sglang_overlay.errors import SettingsError
from sglang_overlay.schemes.choice import SchemeChoice, parse

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


class Mode(enum.Enum):
    """Whether fp8 loads are streamed; members' values are those of ``SGLANG_STREAMFP8``."""

    OFF = "0"
    ON = "1"
    REQUIRE = "require"


@dataclass(frozen=True)
class Settings:
    """What the user asked for, validated."""

    mode: Mode = Mode.ON
    report_folder: Path | None = None
    allow_missing: bool = False
    schemes: SchemeChoice = field(default_factory=SchemeChoice)
    pinned_ring: bool = False
    cpu_reference: bool = False

    @property
    def required_by(self) -> str | None:
        """The variable, with its value, under which an fp8 load that cannot be streamed is an error."""
        if not self.schemes.is_stock:
            return f"{SCHEME_VARIABLE}={'/'.join(sorted(self.schemes.names))}"
        return f"{MODE_VARIABLE}={self.mode.value}" if self.mode is Mode.REQUIRE else None


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Read and validate the settings.

    Args:
        environ: usually ``os.environ``.

    Raises:
        SettingsError: a variable has an unknown name or value; the message lists the valid ones.
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
    return found


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
