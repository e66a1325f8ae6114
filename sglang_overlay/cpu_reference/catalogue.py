# SPDX-License-Identifier: Apache-2.0
"""What the CPU reference platform patches in SGLang, as data. Only registered where the platform is in use.

``create_weights`` and ``process_weights_after_loading`` are not among them: which scheme a layer gets on this platform,
and every byte of the result except the quantizer's own arithmetic, is upstream's choice.
"""

from __future__ import annotations

from sglang_overlay.hooks.hook import Hook, HookKind, Place

_COMPRESSED = "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8_moe"
_COMPRESSED_CONFIG = "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig"

HOOKS = (
    Hook(
        target="sglang.srt.utils.common.get_device",
        wrapper="sglang_overlay.cpu_reference.unasked:device_name",
        kind=HookKind.REPLACE,
        parameters=("device_id",),
        why="finds no accelerator and raises, without asking the platform, in releases before 0.5.13",
        related=(),
        remove_when="0.5.12.post1 is no longer supported",
    ),
    Hook(
        target="sglang.kernels.ops.quantization.fp8_kernel.scaled_fp8_quant",
        wrapper="sglang_overlay.cpu_reference.quantizer:scaled_fp8_quant",
        kind=HookKind.REPLACE,
        parameters=("input", "scale", "num_token_padding", "use_per_token_if_dynamic"),
        why="the kernel it calls, sgl_per_tensor_quant_fp8, is undefined without a GPU; fp8 experts need it",
        related=(),
        remove_when="upstream gives scaled_fp8_quant a CPU form",
        elsewhere=(Place("sglang.srt.layers.quantization.fp8_kernel.scaled_fp8_quant"),),
    ),
    Hook(
        target="sglang.srt.layers.quantization.fp8_utils.apply_fp8_linear",
        wrapper="sglang_overlay.cpu_reference.linear:apply_fp8_linear",
        kind=HookKind.REPLACE,
        parameters=("input", "weight", "weight_scale", "input_scale", "bias"),
        why="quantizes the activation with a Triton kernel and multiplies with a GPU GEMM",
        related=(),
        remove_when="upstream's fp8 linear runs on a CPU without AMX",
    ),
    Hook(
        target="sglang.srt.layers.quantization.fp8_utils.triton_w8a8_block_fp8_linear",
        wrapper="sglang_overlay.cpu_reference.linear:triton_w8a8_block_fp8_linear",
        kind=HookKind.REPLACE,
        parameters=("input", "weight", "block_size", "weight_scale", "input_scale", "bias"),
        why="what upstream chooses for block-wise fp8 without a GPU is a Triton kernel",
        related=(),
        remove_when="upstream's block-wise fp8 linear runs on a CPU without AMX",
    ),
    Hook(
        target="sglang.srt.layers.quantization.fp8_utils.mxfp8_group_quantize",
        wrapper="sglang_overlay.cpu_reference.mxfp8:mxfp8_group_quantize",
        kind=HookKind.REPLACE,
        parameters=("x",),
        why="quantizes with a Triton kernel of a package that comes with sgl-kernel",
        related=(),
        remove_when="upstream's MXFP8 quantizer runs on a CPU",
    ),
    Hook(
        target="sglang.srt.layers.quantization.fp8_utils.dispatch_w8a8_mxfp8_linear",
        wrapper="sglang_overlay.cpu_reference.mxfp8:dispatch_w8a8_mxfp8_linear",
        kind=HookKind.REPLACE,
        parameters=(),
        why="MXFP8 linear layers run on Blackwell, in DeepGEMM and on ROCm only",
        related=(),
        remove_when="upstream's MXFP8 linear runs on a CPU",
    ),
    Hook(
        target="sglang.srt.layers.quantization.fp8.Fp8MoEMethod._process_mxfp8_moe_weights",
        wrapper="sglang_overlay.cpu_reference.mxfp8:process_mxfp8_moe_weights",
        kind=HookKind.REPLACE,
        parameters=("self", "layer", "quantize"),
        why="quantizes MXFP8 experts, and lays them out for a kernel, on SM100 and on ROCm only",
        related=(),
        remove_when="upstream's MXFP8 experts run on a CPU",
    ),
    Hook(
        target="sglang.srt.configs.update_config.may_get_weight_block_size",
        wrapper="sglang_overlay.cpu_reference.mxfp8:square_blocks_of",
        kind=HookKind.AROUND,
        parameters=("model_config", "load_config"),
        why="what pads a model for more ranks than it divides by, on every CPU, asserts that blocks are square",
        related=(),
        remove_when="upstream's get_moe_padding_size takes MXFP8's groups",
    ),
    Hook(
        target=f"{_COMPRESSED}.CompressedTensorsW8A8Fp8MoE.apply_weights",
        wrapper="sglang_overlay.cpu_reference.moe:apply_weights",
        kind=HookKind.REPLACE,
        parameters=("self", "layer", "dispatch_output"),
        why="per-channel experts run in GPU kernels only",
        related=(),
        remove_when="upstream's per-channel fp8 experts run on a CPU without AMX",
    ),
    Hook(
        target=f"{_COMPRESSED_CONFIG}._check_scheme_supported",
        wrapper="sglang_overlay.cpu_reference.linear:is_scheme_supported",
        kind=HookKind.REPLACE,
        parameters=("self", "min_capability", "error"),
        why="asks CUDA for its compute capability, which fails without a GPU: no checkpoint in compressed-tensors' "
        "format could be loaded",
        related=(),
        remove_when="upstream asks its platform instead",
    ),
    Hook(
        target="sglang.srt.layers.quantization.fp8.Fp8MoEMethod.apply",
        wrapper="sglang_overlay.cpu_reference.moe:apply",
        kind=HookKind.REPLACE,
        parameters=("self", "layer", "dispatch_output"),
        why="every MoE runner it knows is a GPU or AMX kernel",
        related=(),
        remove_when="upstream's fp8 fused experts run on a CPU without AMX",
    ),
    Hook(
        target="sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        wrapper="sglang_overlay.cpu_reference.moe:add_gated_shared_experts",
        kind=HookKind.REPLACE,
        parameters=("hidden_states", "gate_weight", "shared_output", "final_hidden_states"),
        why="Qwen2-MoE adds its shared expert with a Triton kernel on every platform but AMX and NPU",
        related=(),
        remove_when="upstream takes its torch path (F.sigmoid) where Triton has no driver",
        elsewhere=(
            Place("sglang.kernels.ops.layernorm.elementwise.fused_gate_sigmoid_mul_add"),
            Place("sglang.srt.layers.elementwise.fused_gate_sigmoid_mul_add"),
        ),
        without="Nothing: this release takes its torch path everywhere.",
    ),
    Hook(
        target="sglang.srt.distributed.parallel_state.init_model_parallel_group",
        wrapper="sglang_overlay.cpu_reference.groups:without_nccl",
        kind=HookKind.AROUND,
        parameters=("group_ranks", "local_rank", "backend", "use_pynccl"),
        why="gives groups an NCCL communicator on every platform but NPU and XPU, in releases before 0.5.23",
        related=(),
        remove_when="0.5.22 is no longer supported",
    ),
)

OWN_METHODS = (
    Hook(
        target="sglang_overlay.schemes.int8.Int8ExpertsMethod.apply",
        wrapper="sglang_overlay.cpu_reference.moe:apply_weights",
        kind=HookKind.REPLACE,
        parameters=("self", "layer", "dispatch_output"),
        why="this package's own method, whose kernel is Triton's",
        related=(),
        remove_when="the int8 scheme goes",
    ),
)
"""Of this package, patched in the same way: nothing that an SGLang release could change."""
