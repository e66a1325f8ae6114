# SPDX-License-Identifier: Apache-2.0
"""Compile SGLang's JIT kernels ahead of time: where the wheels are collected, or on the GPU machine.

A module of SGLang's ``load_jit`` is in ``TVM_FFI_CACHE_DIR`` under a name that depends on its sources, the GPU and
tvm-ffi's version, and is found there whoever compiled it.

    python -m workbench.gpu.gpu_modules --headers FOLDER   # needs nvcc and no GPU
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "TVM_FFI_CACHE_DIR"
SOURCES_VARIABLE = "STREAMFP8_ROW_KERNELS"
"""Where the sources of the newest release's row quantizer are."""
CAPABILITY = (9, 0)
"""Architecture that modules are compiled for: Hopper."""
ENVIRON = {"TVM_FFI_CUDA_ARCH_LIST": "9.0a"}
"""SGLang sets this around each build and then restores it: if it were not set before, builds in other threads would
lose it."""
MODULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    # Quantization, of weights and of activations.
    ("quantization.per_tensor_quant_fp8", "per_tensor_quant_fp8_module", (False, "bfloat16")),
    ("quantization.per_tensor_quant_fp8", "per_tensor_quant_fp8_module", (True, "bfloat16")),
    # A forward pass of the tiny checkpoints; found by reading SGLang 0.5.17. Missing ones are compiled when needed.
    ("activation.activation", "activation_module", ("bfloat16",)),
    ("layernorm.norm", "_jit_qknorm_module", (64, "bfloat16")),
    ("attention.rope", "_jit_fused_rope_module", (True, 64, "bfloat16", "bfloat16")),
    ("attention.rope", "_jit_fused_rope_module", (False, 32, "bfloat16", "bfloat16")),
    ("attention.rope", "_jit_rotary_embedding_module", ()),
    ("attention.clamp_position", "_jit_clamp_position_module", ("int64",)),
    ("attention.clamp_position", "_jit_clamp_position_module", ("int32",)),
    ("kvcache.kvcache", "_jit_kvcache_module", (256, 256)),
    ("kvcache.set_mla_kv_buffer", "set_mla_kv_buffer_module", (256, 64, True)),
    ("moe.moe_fused_gate", "_jit_moe_fused_gate_module", ()),
)
"""Module below ``sglang.kernels.ops``, the function that loads the kernel, and its arguments; dtypes by name."""
ROW_KERNELS = "row_kernels"
"""Folder of the newest release's row quantizer: that release itself needs a different torch than the machine's."""
_ROW_FLAGS = ["-DSGL_CUDA_ARCH=900", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--use_fast_math"]
"""Flags as in 0.5.23 for Hopper (``_jit_per_token_quant_fp8_module``)."""
THREADS = min(16, len(os.sched_getaffinity(0)))


_Job = tuple[str, Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Built:
    """A module: seconds to load it, including compiling if needed, and the error if any."""

    name: str
    seconds: float
    error: str = ""


def build_all(headers: Path | None) -> Iterator[Built]:
    """Load every module, several at a time, compiling those that are not in the cache."""
    os.environ.update({**ENVIRON, "LIBRARY_PATH": str(_with_cudart(Path(os.environ[CACHE_VARIABLE])))})
    jobs: list[_Job] = [(f"{where}:{what}{given}", _loaded, (where, what, given)) for where, what, given in MODULES]
    if headers is not None:
        jobs.append(("row kernels of the newest release", row_kernels, (headers,)))
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(_built, jobs)


def compiled(cache: Path) -> list[Path]:
    """The modules in a cache."""
    return [path for path in cache.glob("*/*.so") if not path.is_symlink()]


def _with_cudart(cache: Path) -> Path:
    """A folder with a ``libcudart.so`` to link with: torch has it only under a versioned name."""
    import torch

    folder = cache / "lib"
    folder.mkdir(exist_ok=True)
    for found in Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcudart.so.*"):
        (folder / "libcudart.so").unlink(missing_ok=True)
        (folder / "libcudart.so").symlink_to(found)
    return folder


def _built(job: _Job) -> Built:
    name, load, arguments = job
    begin = time.perf_counter()
    try:
        load(*arguments)
    except Exception as error:
        return Built(name, time.perf_counter() - begin, f"{type(error).__name__}: {str(error)[-800:]}")
    return Built(name, time.perf_counter() - begin)


def _loaded(where: str, what: str, given: tuple[Any, ...]) -> Any:
    import torch

    module = importlib.import_module(f"sglang.kernels.ops.{where}")
    return getattr(module, what)(*(getattr(torch, one) if isinstance(one, str) else one for one in given))


def row_kernels(sources: Path) -> Any:
    """The row quantizer of the newest release, which needs only the headers in ``sources`` of that release.

    Its function ``per_token_quant_fp8`` takes input, fp8 output and float32 scales ``[rows, 1]``, and picks one of two
    kernels by the number of rows.
    """
    import tvm_ffi
    from tvm_ffi import cpp

    # Like the others, under a name that depends on the sources.
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources.rglob("*.*h"))))
    build = Path(os.environ[CACHE_VARIABLE]) / f"{ROW_KERNELS}_{digest.hexdigest()[:16]}"
    built = build / f"{ROW_KERNELS}.so"
    if built.is_file():
        return tvm_ffi.load_module(str(built))
    return cpp.load_inline(
        ROW_KERNELS,
        cuda_sources=[
            f'#include "{sources / "csrc" / "gemm" / "per_token_quant_fp8.cuh"}"',
            "using namespace sglang;",
            "TVM_FFI_DLL_EXPORT_TYPED_FUNC(per_token_quant_fp8, (per_token_quant_fp8<bf16_t>));",
        ],
        extra_cuda_cflags=_ROW_FLAGS,
        extra_include_paths=[str(sources / "include")],
        build_directory=str(build),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile SGLang's modules for Hopper GPUs into the folder that TVM_FFI_CACHE_DIR names."""
    parser = argparse.ArgumentParser(prog="workbench.gpu.gpu_modules", description=main.__doc__)
    parser.add_argument("--headers", type=Path, help="sources of the newest release's row kernels")
    options = parser.parse_args(arguments)
    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch

    with ExitStack() as stack:
        stack.enter_context(override_jit_cuda_arch(*CAPABILITY))
        found = list(build_all(options.headers))
    for one in found:
        print(f"{one.seconds:6.1f} s  {one.name}  {one.error}", flush=True)
    # Errors do not count: without a driver, compiled modules cannot be loaded.
    made = compiled(Path(os.environ[CACHE_VARIABLE]))
    print(f"{len(made)} of {len(found)} compiled")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
