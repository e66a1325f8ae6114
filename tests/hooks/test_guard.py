# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from sglang_overlay.errors import StreamingUnavailableError
from sglang_overlay.load.diagnostics import Diagnostics
from sglang_overlay.load.refusal import refuse


def test_reason_that_is_a_sentence_gets_no_second_full_stop(caplog):
    refuse(None, "there is no more room. Make some.")
    Diagnostics().warn("something is wrong with it.")
    assert [record.getMessage() for record in caplog.records] == [
        "StreamFP8: there is no more room. Make some. The model is loaded as in stock SGLang.",
        "StreamFP8: something is wrong with it.",
    ]
    with pytest.raises(StreamingUnavailableError, match=r"cannot be streamed: there is no room\.$"):
        refuse("SGLANG_STREAMFP8=require", "there is no room.")
