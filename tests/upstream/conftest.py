# SPDX-License-Identifier: Apache-2.0
"""Workers that more than one file of tests here needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from workbench.loads import LoadWorkers

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def odd_workers(tmp_path_factory):
    """Workers that know the models of ``misbehaving``."""
    with pytest.MonkeyPatch.context() as patch:
        # A spawned process gets its parent's sys.path.
        patch.syspath_prepend(str(HERE))
        environ = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "misbehaving"}
        with LoadWorkers(tmp_path_factory.mktemp("odd"), environ, start_method="spawn") as group:
            yield group
