# SPDX-License-Identifier: Apache-2.0
"""What SGLang does with weights, where releases differ: asked of SGLang itself, never of its version."""

from __future__ import annotations

import inspect
from typing import Any


def has_row_kernel() -> bool:
    """Whether SGLang has a kernel of its own for whole rows on CUDA, and does not take each for a group of values."""
    try:
        from sglang.kernels.ops.quantization import fp8_kernel
    except ImportError:
        from sglang.srt.layers.quantization import fp8_kernel
    by_groups = inspect.unwrap(fp8_kernel.sglang_per_token_group_quant_fp8)
    return "sglang_per_token_quant_fp8" in by_groups.__code__.co_names


def takes_hpc_ops_weights(backend: Any) -> bool:
    """Whether experts are run by HPC-Ops, which wants their weights in a layout of its own."""
    return hasattr(backend, "is_hpc_ops") and bool(backend.is_hpc_ops())


def takes_activation_params(method: Any, backend: Any) -> bool:
    """Whether experts are run by FlashInfer's TRT-LLM kernels, and these are given parameters of the activation."""
    trtllm = backend.is_flashinfer_trtllm() or backend.is_flashinfer_trtllm_routed()
    return bool(trtllm and hasattr(method, "_prepare_flashinfer_trtllm_activation_params") and method._owns_moe_runner)
