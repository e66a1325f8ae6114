# SPDX-License-Identifier: Apache-2.0
"""How SGLang handles weights where releases differ, found out from SGLang itself, never from its version."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def has_row_kernel() -> bool:
    """Whether SGLang has a dedicated kernel for whole rows on CUDA, instead of quantizing each row as one group."""
    try:
        from sglang.kernels.ops.quantization import fp8_kernel
    except ImportError:
        from sglang.srt.layers.quantization import fp8_kernel
    by_groups = inspect.unwrap(fp8_kernel.sglang_per_token_group_quant_fp8)
    return "sglang_per_token_quant_fp8" in by_groups.__code__.co_names


def has_fp4_experts(config: Any) -> bool:
    """Whether the checkpoint's experts are FP4, which SGLang knows since 0.5.12."""
    return bool(getattr(config, "is_fp4_experts", False))


def takes_hpc_ops_weights(backend: Any) -> bool:
    """Whether HPC-Ops runs the experts, which needs its own weight layout."""
    return hasattr(backend, "is_hpc_ops") and bool(backend.is_hpc_ops())


def takes_activation_params(method: Any, backend: Any) -> bool:
    """Whether FlashInfer's TRT-LLM kernels run the experts, and take parameters of the activation."""
    trtllm = backend.is_flashinfer_trtllm() or backend.is_flashinfer_trtllm_routed()
    return bool(trtllm and hasattr(method, "_prepare_flashinfer_trtllm_activation_params") and method._owns_moe_runner)


def uses_aiter() -> bool:
    """Whether AMD's aiter runs the layers, which needs weights in its own order."""
    from sglang.srt.layers.quantization import fp8

    return bool(fp8._use_aiter)


def packs_experts_to_int4() -> bool:
    """Whether SGLang packs experts to int4, an option on ROCm."""
    from sglang.srt.layers.quantization import fp8

    return bool(fp8._use_hip_int4)


def device_kind() -> str:
    """What decides how weights are laid out for this process's device: ``cpu``, ``sm90``, ``gfx942``."""
    if not torch.cuda.is_available():
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties().gcnArchName)
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def kernels() -> dict[str, str]:
    """The kernels that a server was told to use, by kind of layer; some need weights in an order of their own."""
    from sglang.srt.layers.moe import get_moe_runner_backend
    from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend

    found = {"moe runner": get_moe_runner_backend(), "fp8 gemm": get_fp8_gemm_runner_backend()}
    return {layers: str(getattr(backend, "value", backend)) for layers, backend in found.items()}


def runs_shuffled_rows(rows: int) -> bool:
    """Whether a per-channel weight with ``rows`` output channels is run by a kernel that needs it shuffled."""
    from sglang.srt.layers.quantization import fp8

    if not uses_aiter():
        return False
    # Earlier releases, up to 0.5.19, have one kernel for all sizes.
    asked = getattr(fp8, "use_aiter_bpreshuffle_gemm", None)
    return asked is None or bool(asked(rows))


SHUFFLED_ROWS = 16
"""Rows that are shuffled together by ``shuffle_weight`` of ``aiter/ops/shuffle.py`` with layout (16, 16)."""


def shuffle(weight: torch.Tensor) -> torch.Tensor:
    """fp8 ``[..., rows, columns]`` in the order of aiter's kernels, by aiter's own function, as SGLang calls it."""
    from sglang.srt.layers.quantization import fp8

    shuffled: torch.Tensor = fp8.shuffle_weight(weight, (SHUFFLED_ROWS, 16))
    return shuffled


def unshuffle(weight: torch.Tensor) -> torch.Tensor:
    """The inverse of ``shuffle``. aiter has no such function, nor has SGLang before 0.5.23."""
    *_, rows, columns = weight.shape
    tiles = weight.reshape(-1, rows // SHUFFLED_ROWS, columns // 32, 2, SHUFFLED_ROWS, 16)
    return tiles.permute(0, 1, 4, 2, 3, 5).reshape(weight.shape)
