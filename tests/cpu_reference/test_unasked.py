# SPDX-License-Identifier: Apache-2.0
"""Old releases start on this platform although they do not ask it; nothing else changes for them."""

from __future__ import annotations

import importlib
import re
import sys
from importlib import util

import pytest

from sglang_overlay.cpu_reference import unasked

pytestmark = pytest.mark.every_release


@pytest.mark.parametrize(("module", "package"), unasked.PACKAGES.items())
def test_kernels_are_imported_and_their_package_still_is_not(module, package, monkeypatch):
    if util.find_spec(package) is not None:
        pytest.skip("the package is installed")
    monkeypatch.delitem(sys.modules, module, raising=False)
    unasked.answer_for_kernels()
    kernels = sys.modules[module]
    with pytest.raises(NotImplementedError, match=re.escape(f"{module}.run")):
        kernels.run()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(package)
