# SPDX-License-Identifier: Apache-2.0
"""The GPUs that can be stood in for, as data, and the variables that make a process one with such a GPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
PACKAGES_VARIABLE = "STANDIN_PACKAGES"


@dataclass(frozen=True)
class Gpu:
    """What SGLang asks of a GPU.

    Attributes:
        name: as the driver gives it.
        capability: major and minor; of an AMD GPU, what ROCm's torch reports.
        multiprocessors: or compute units.
        architecture: ``gcnArchName`` of an AMD GPU; empty for NVIDIA's.
        environ: further variables of its processes.
        packages: that SGLang finds on it, whatever a test asks for.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    architecture: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


SERVER_ARGS = {"disable_custom_all_reduce": True, "disable_flashinfer_autotune": True, "model_impl": "sglang"}
"""SGLang's own all-reduce asks the driver for handles. FlashInfer would be tuned after the load, by running its kernels
(until 0.5.13). A model that cannot be imported must not become another one."""

PER_TOKEN = {"SGLANG_USE_AITER": "1", "SGLANG_USE_AITER_FP8_PER_TOKEN": "1"}
"""aiter with one scale a token and one an output channel, for linear layers."""

GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108),
    "l4": Gpu("NVIDIA L4", (8, 9), 58),
    "h200": Gpu("NVIDIA H200", (9, 0), 132),
    # A seventh of one: whether a row is a warp's is decided at 256 rows, among those of a small layer.
    "h200-1g": Gpu("NVIDIA H200 MIG 1g.18gb", (9, 0), 16),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, packages=("flashinfer",)),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170),
    "mi300x": Gpu("AMD Instinct MI300X", (9, 4), 304, "gfx942:sramecc+:xnack-"),
    "mi300x-aiter": Gpu("AMD Instinct MI300X", (9, 4), 304, "gfx942:sramecc+:xnack-", {"SGLANG_USE_AITER": "1"}),
    "mi300x-per-token": Gpu("AMD Instinct MI300X", (9, 4), 304, "gfx942:sramecc+:xnack-", PER_TOKEN),
    "mi355x": Gpu("AMD Instinct MI355X", (9, 5), 256, "gfx950:sramecc+:xnack-"),
    "mi355x-aiter": Gpu("AMD Instinct MI355X", (9, 5), 256, "gfx950:sramecc+:xnack-", {"SGLANG_USE_AITER": "1"}),
}


def environ(
    gpu: str, *, devices: int = 1, memory: int = 4 * GIB, packages: Iterable[str] = (), memory_saver: bool = False
) -> dict[str, str]:
    """Variables for processes that are to have GPUs.

    Args:
        gpu: which, a key of ``GPUS``.
        devices: how many.
        memory: bytes of each.
        packages: ``flashinfer`` and ``deep_gemm``, where SGLang is to find them.
        memory_saver: whether they can run with ``--enable-memory-saver``, for which SGLang preloads a library.
    """
    kind = GPUS[gpu]
    there = {*kind.packages, *packages}
    major, minor = kind.capability
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **_preloaded(memory_saver),
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(HERE / "site" / "bin"), os.environ.get("PATH", os.defpath)]),
        "STANDIN_GPU": gpu,
        "STANDIN_NAME": kind.name,
        "STANDIN_CAPABILITY": str(10 * major + minor),
        "STANDIN_ARCHITECTURE": kind.architecture,
        "STANDIN_MULTIPROCESSORS": str(kind.multiprocessors),
        "STANDIN_DEVICES": str(devices),
        "STANDIN_MEMORY": str(memory),
        # Triton's kernels run as they are, in its interpreter.
        "TRITON_INTERPRET": "1",
        # There is no NCCL without a driver: SGLang goes on with torch.distributed.
        "SGLANG_NCCL_SO_PATH": str(HERE / "no-nccl"),
        # NVIDIA's builds import FlashInfer, available or not, and bring DeepGEMM, without which 0.5.21 has no DeepSeek.
        PACKAGES_VARIABLE: ",".join(sorted(there if kind.architecture else there | {"flashinfer", "deep_gemm"})),
        "SGLANG_IS_FLASHINFER_AVAILABLE": str("flashinfer" in there).lower(),
        "SGLANG_ENABLE_JIT_DEEPGEMM": str(int("deep_gemm" in there)),
        **kind.environ,
    }


def _preloaded(memory_saver: bool) -> dict[str, str]:
    if not memory_saver:
        return {"LD_PRELOAD": str(runtime())}
    packages = Path(torch.__file__).parents[1]
    (hook,) = packages.glob("torch_memory_saver_hook_mode_preload_cu13.*.so")
    # The hook is loaded before torch, which brings the library that it needs.
    return {"LD_PRELOAD": f"{hook}:{runtime()}", "LD_LIBRARY_PATH": str(packages / "nvidia" / "cu13" / "lib")}


def runtime() -> Path:
    """The library that takes the place of CUDA's runtime, compiled when first asked for."""
    source = HERE / "cuda_runtime.c"
    packages = Path(torch.__file__).parents[1]
    # CUDA's headers as torch's own build has them; Triton brings those that NVIDIA keeps in another package.
    includes = (packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include")
    key = hashlib.sha256(source.read_bytes() + str(includes).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"streamfp8-standin-{os.getuid()}-{key}"
    # By that name torch asks for the driver too.
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        draft = folder / f"{os.getpid()}.so"
        flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in includes)]
        subprocess.run(["cc", *flags, "-o", str(draft), str(source), "-lpthread", "-ldl"], check=True)
        draft.replace(library)
    return library
