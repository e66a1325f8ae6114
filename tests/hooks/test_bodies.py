# SPDX-License-Identifier: Apache-2.0
"""What is kept of each supported release's hooked functions is what they are."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

from sglang_overlay.hooks import bodies, releases
from sglang_overlay.hooks.catalogue import STREAMING

INSTALLED = Path(util.find_spec("sglang").origin).parents[1]
pytestmark = pytest.mark.every_release


def test_installed_release_is_as_it_is_kept():
    release, kept = releases.installed(), bodies._data()
    made = bodies.described({release: INSTALLED})
    assert made["files"][release] == kept["files"][release]
    assert len(made["functions"]) == len(STREAMING) - len(releases.absent())
    for target, (fingerprint,) in ((target, found) for target, found in made["functions"].items()):
        assert release in kept["functions"][target][fingerprint], target


def test_each_supported_release_is_kept():
    assert tuple(bodies._data()["files"]) == releases.supported()


def test_installed_release_has_nothing_unknown_by_its_files_or_by_its_functions(monkeypatch):
    assert bodies.unknown(INSTALLED) == ()
    kept = {**bodies._data(), "files": {}}
    monkeypatch.setattr(bodies, "_data", lambda: kept)
    assert bodies.unknown(INSTALLED) == ()
