# SPDX-License-Identifier: Apache-2.0
"""Schemes by name, of this package and of others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sglang_overlay.errors import SchemeError
from sglang_overlay.schemes import registry
from sglang_overlay.schemes.choice import SchemeChoice
from sglang_overlay.schemes.scheme import LayerKind


def test_every_scheme_of_this_package_is_found_and_says_what_it_is():
    for name in registry.BUILT_IN:
        scheme = registry.find(name)
        assert scheme.summary
        assert any(scheme.why_not(kind) is None for kind in LayerKind)


def test_unknown_scheme_is_told_with_those_there_are():
    with pytest.raises(SchemeError, match=r"'blocks'. Use one of: stock, .*block.*, none"):
        registry.check(SchemeChoice("blocks"))


def test_mxfp8_is_told_to_be_sglangs_own():
    with pytest.raises(SchemeError, match=r"no quantization scheme 'mxfp8'.* start SGLang with --quantization mxfp8"):
        registry.check(SchemeChoice("mxfp8"))


def test_scheme_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setitem(registry.entry_points(), "gone", registry.metadata.EntryPoint("gone", "gone:GONE", ""))
    registry.check(SchemeChoice("gone"))
    with pytest.raises(SchemeError, match="'gone' cannot be imported: No module named 'gone'"):
        registry.find("gone")


def test_looking_names_up_imports_neither_torch_nor_sglang():
    code = """
import sys
from sglang_overlay.schemes import choice, registry
registry.check(choice.parse("block", ""))
print([name for name in ("torch", "sglang") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
