# SPDX-License-Identifier: Apache-2.0
"""Old releases start on this platform although they do not ask it; nothing else changes for them."""

from __future__ import annotations

import importlib
import sys
from importlib import util

import pytest

from sglang_overlay.cpu_reference import unasked

pytestmark = pytest.mark.every_release


@pytest.mark.skipif(util.find_spec("sgl_kernel") is not None, reason="the package is installed")
def test_kernels_of_host_kv_caches_are_imported_and_their_package_still_is_not(monkeypatch):
    monkeypatch.delitem(sys.modules, unasked.MODULE, raising=False)
    unasked.answer_for_kv_transfers()
    kernels = importlib.import_module(unasked.MODULE)
    monkeypatch.setitem(sys.modules, unasked.MODULE, kernels)
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.kvcacheio\.transfer_kv_direct"):
        kernels.transfer_kv_direct()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sgl_kernel")
