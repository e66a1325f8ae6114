# SPDX-License-Identifier: Apache-2.0
"""What SGLang's experts need after loading, where releases differ: asked of SGLang itself, never of its version."""

from __future__ import annotations

from typing import Any


def takes_hpc_ops_weights(backend: Any) -> bool:
    """Whether experts are run by HPC-Ops, which wants their weights in a layout of its own."""
    return hasattr(backend, "is_hpc_ops") and bool(backend.is_hpc_ops())


def takes_activation_params(method: Any, backend: Any) -> bool:
    """Whether experts are run by FlashInfer's TRT-LLM kernels, and these are given parameters of the activation."""
    trtllm = backend.is_flashinfer_trtllm() or backend.is_flashinfer_trtllm_routed()
    return bool(trtllm and hasattr(method, "_prepare_flashinfer_trtllm_activation_params") and method._owns_moe_runner)
