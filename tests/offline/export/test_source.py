# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that cannot be read are refused with a message that says which file, and what is wrong with it."""

from __future__ import annotations

import json

import pytest

from sglang_overlay.errors import ExportError
from sglang_overlay.offline.export.source import SourceCheckpoint

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is no checkpoint: it has no config.json"),
        ({"config.json": '{"model_ty'}, "config.json is not valid JSON"),
        ({"config.json": "[]"}, "config.json holds no JSON object"),
        ({"config.json": '{"quantization_config": {"quant_method": "awq"}}'}, "quantized already, by awq"),
        ({"config.json": "{}"}, "has no weights"),
        ({"config.json": "{}", INDEX: "not JSON"}, "index.json is not valid JSON"),
        ({"config.json": "{}", INDEX: "{}"}, "index.json has no weight_map"),
    ],
)
def test_checkpoint_that_cannot_be_exported_is_refused(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ExportError, match=said):
        SourceCheckpoint(tmp_path)


def test_config_may_say_that_nothing_is_quantized(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
    assert SourceCheckpoint(tmp_path).files == ["1.safetensors"]
