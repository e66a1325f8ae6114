# SPDX-License-Identifier: Apache-2.0
"""What layers are given, as SGLang gives it to them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from workbench.loads.job import LoadJob
from workbench.loads.layer_inputs import ROWS
from workbench.loads.updates import tensors_of

PROMPTS = (tuple(range(3, 403)), tuple(range(100, 300)))


def test_first_layer_is_given_normed_embeddings(workers, checkpoint, tmp_path):
    path, file = checkpoint("qwen3_moe"), tmp_path / "inputs"
    workers.load(LoadJob(path, quantization=None, prompts=PROMPTS, new_tokens=2, recorded_inputs=file))
    found = load_file(file)
    config = json.loads((path / "config.json").read_text())
    weights = dict(tensors_of(path))
    tokens = torch.tensor([token for prompt in PROMPTS for token in prompt])[:ROWS]
    embedded = weights["model.embed_tokens.weight"][tokens].double()
    norm = embedded.square().mean(-1, keepdim=True).add(config["rms_norm_eps"]).rsqrt()
    expected = embedded * norm * weights["model.layers.0.input_layernorm.weight"].double()
    torch.testing.assert_close(
        found["model.layers.0.self_attn.qkv_proj"].double(), expected, rtol=2**-7, atol=torch.finfo(torch.bfloat16).tiny
    )
    names = {name.removeprefix("model.layers.0.") for name in found}
    assert names >= {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts"}
