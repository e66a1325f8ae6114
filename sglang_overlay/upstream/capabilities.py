# SPDX-License-Identifier: Apache-2.0
"""What the installed SGLang can do, where supported releases differ: asked of SGLang itself, never of its version.

That a function has moved, or is not there at all, is said by its touch point (``catalogue.py``) instead.
"""

from __future__ import annotations

from typing import Any

import torch


def model_of(updater: Any) -> torch.nn.Module:
    """The model whose weights are updated: by a ``WeightUpdater``, or by the ``ModelRunner`` itself."""
    model: torch.nn.Module = updater.get_model() if hasattr(updater, "get_model") else updater.model
    return model


def has_sessions(updater: Any) -> bool:
    """Whether an update may come in several calls, between a begin and an end."""
    return hasattr(updater, "begin_weight_update")


def takes_hpc_ops_weights(backend: Any) -> bool:
    """Whether experts are run by HPC-Ops, which wants their weights in a layout of its own."""
    return hasattr(backend, "is_hpc_ops") and bool(backend.is_hpc_ops())


def takes_activation_params(method: Any, backend: Any) -> bool:
    """Whether experts are run by FlashInfer's TRT-LLM kernels, and these are given parameters of the activation."""
    trtllm = backend.is_flashinfer_trtllm() or backend.is_flashinfer_trtllm_routed()
    return bool(trtllm and hasattr(method, "_prepare_flashinfer_trtllm_activation_params") and method._owns_moe_runner)
