# SPDX-License-Identifier: Apache-2.0
"""SGLang on a machine with no accelerator: a reference platform, correct and readable, not fast.

It steps in only where it is asked for (``SGLANG_STREAMFP8_CPU_REFERENCE=1``), there is no accelerator, and SGLang's own
CPU engine is not wanted (``SGLANG_USE_CPU_ENGINE`` unset). Then ``python -m sglang.launch_server --model-path X
--quantization fp8 --device cpu`` loads, quantizes and generates with SGLang's own model code, loaders, scheduler and
HTTP server. What it stands in for, and why:

1. *Platform facts* (``platform.py``): memory sizes, gloo, no pinned memory, ``torch_native`` attention, no graphs, a
   small KV pool, one group of cores per tensor-parallel rank. Being out of tree also selects the native rope, which
   otherwise asks for vLLM's kernels.
2. *Per-tensor fp8 quantizer* (``quantizer.py``): SGLang's ``scaled_fp8_quant`` calls a CUDA kernel without a CPU form.
   Only the quantizer is replaced; which scheme a layer gets and what is done with it stays SGLang's.
3. *MXFP8* (``mxfp8.py``): its quantizer, its linear layers, and what SGLang does with its experts after loading.
4. *fp8 linear and fp8 experts* (``linear.py``, ``moe.py``): SGLang multiplies fp8 by fp8 in CUDA or Triton kernels.
   Here the weight is dequantized to the activation's dtype and multiplied there (W8A16): activations stay as they are.
   Qwen2-MoE's gated shared expert, a Triton kernel, is spelled out in torch.
5. *MLA attention* (``attention.py``): SGLang's MLA kernels are CUDA. Here every MLA layer takes SGLang's own absorbed
   form, whose attention is then ordinary attention with one key head.

Limitations:

1. fp4 formats, biased or clamped experts have no reference here; they raise ``NotImplementedError``.
2. Attention runs one sequence at a time.
3. No graphs, no overlap schedule, no speculative decoding.
4. ``SGLANG_PLUGINS``, SGLang's allowlist, covers platforms too: a list without ``streamfp8_cpu`` and
   ``streamfp8_cpu_reference`` leaves this package out.
"""
