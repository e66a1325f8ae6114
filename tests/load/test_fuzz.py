# SPDX-License-Identifier: Apache-2.0
"""Whatever a checkpoint's files look like: the load is stock's, or a clear error; nothing crashes, hangs or lingers.

``STREAMFP8_FUZZ_CASES=500`` runs more cases; ``STREAMFP8_FUZZ_FIRST=n STREAMFP8_FUZZ_CASES=1`` runs one of them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
from harness.fuzz import SPECS, Case, fuzz, summary
from harness.mutations import MUTATIONS

FIRST = int(os.environ.get("STREAMFP8_FUZZ_FIRST", "0"))
CASES = int(os.environ.get("STREAMFP8_FUZZ_CASES", str(5 * len(MUTATIONS))))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("family", SPECS)
def test_damaged_checkpoint_loads_as_stock_or_is_a_clear_error(family, checkpoint, tmp_path, record_property):
    cases = list(fuzz(family, checkpoint(**SPECS[family]), tmp_path, FIRST, CASES))
    record_property("verdicts", summary(cases))
    (tmp_path / "cases.json").write_text(json.dumps([asdict(case) for case in cases], indent=1))
    assert [case for case in cases if not case.is_good] == []
    assert len(cases) == CASES


@pytest.mark.parametrize("family", SPECS)
def test_undamaged_checkpoint_is_among_the_cases_and_loads(family, checkpoint, tmp_path):
    (case,) = fuzz(family, checkpoint(**SPECS[family]), tmp_path, 0, 1)
    assert case == Case(0, "nothing: as it was", "identical", "loaded", "loaded")
