# SPDX-License-Identifier: Apache-2.0
"""Finished layers have stock's strides, and not only its bytes: by SGLang's own code with a fake of its CUDA kernel."""

from __future__ import annotations

import pytest
import torch
from core.kernels import RowKernel
from core.streams import make_parameter, make_sources, same_bytes

from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.schemes.stock_linear import LinearPlan


@pytest.fixture
def fp8(monkeypatch):
    """SGLang's module, as if on a GPU with FP8 kernels."""
    from sglang.srt.layers.quantization import fp8

    monkeypatch.setattr(fp8, "_is_cpu", False)
    monkeypatch.setattr(fp8, "per_token_group_quant_fp8", RowKernel())
    monkeypatch.setattr(fp8, "cutlass_fp8_supported", lambda: True)
    return fp8


def stocks(fp8, weight):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    fp8.Fp8LinearMethod(fp8.Fp8Config()).process_weights_after_loading(layer)
    return layer


def streamed(weight):
    layer, plan = torch.nn.Module(), LinearPlan(per_channel=True)
    placeholder = make_parameter(torch.empty_like(weight, device="meta"))
    storage = plan.allocate("weight", placeholder, weight.device)
    found = plan.parameter("weight", placeholder, storage)
    stream = CheckpointStream(
        "weight", placeholder, found.grid, found.quantizer, storage, StagingAccount(), make_sources()
    )
    stream.write(placeholder, weight)
    assert stream.settle() == []
    layer.weight = placeholder
    plan.register(layer, {"weight": storage})
    return layer


@pytest.mark.every_release
@pytest.mark.parametrize("shape", [(64, 32), (1, 32), (2112, 16)])
def test_layer_per_channel_has_stocks_strides(fp8, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, found = stocks(fp8, weight), streamed(weight)
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in expected.named_parameters()}
    for name, stock in expected.named_parameters():
        own = found.get_parameter(name)
        forms = [(type(part), part.dtype, part.shape, part.stride(), part.requires_grad) for part in (own, stock)]
        assert forms[0] == forms[1], name
        assert same_bytes(own, stock), name
    assert found.input_scale is None
    assert expected.input_scale is None
