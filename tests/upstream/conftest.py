# SPDX-License-Identifier: Apache-2.0
"""Workers that more than one file of tests here needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from workbench.loads import LoadWorkers

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """The cache of models from the hub that ``odd_workers`` have: puts a checkpoint there, and returns its name."""
    folder = tmp_path_factory.mktemp("hub")

    def add(checkpoint, name):
        repository = folder / f"models--tiny--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abcd")
        return Path("tiny", name), shutil.copytree(checkpoint, repository / "snapshots" / "0123abcd")

    add.folder = folder
    return add


@pytest.fixture(scope="session")
def odd_workers(tmp_path_factory, hub):
    """Workers that know the models of ``misbehaving``, and those in ``hub``."""
    with pytest.MonkeyPatch.context() as patch:
        # A spawned process gets its parent's sys.path.
        patch.syspath_prepend(str(HERE))
        environ = {
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "misbehaving",
            "HF_HUB_CACHE": str(hub.folder),
            "HF_HUB_OFFLINE": "1",
        }
        with LoadWorkers(tmp_path_factory.mktemp("odd"), environ, start_method="spawn") as group:
            yield group
