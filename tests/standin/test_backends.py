# SPDX-License-Identifier: Apache-2.0
"""What each runner backend and GEMM flag makes of a layer is the same, streamed or not, on each stand-in GPU.

Where stock refuses a combination, streaming refuses it with the same words. An update leaves what a fresh load leaves,
in the same memory, also where upstream has rearranged for a kernel what was loaded. The reference of a scheme that
stock does not have is a checkpoint of the same values, exported, and loaded by stock in the same branch;
``test_schemes.py`` has experts in ``int8`` and per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from harness.exports import ExportJob, run_export
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadFailed, compare
from workbench.loads.updates import Update
from workbench.quality import families

from sglang_overlay.offline.simulation import UnsimulatedReleaseError
from standin.conftest import SERVER_ARGS, Surroundings

BOTH = ("flashinfer", "deep_gemm")
"""Packages that give SGLang the most to choose from."""
GPT_OSS = "GptOssForCausalLM"
"""Experts with biases; by this name ``workbench.quality.families`` has it."""
OVERRIDES: Mapping[tuple[str, str], tuple[tuple[str, Any], ...]] = {
    # Marlin wants a multiple of 64 rows, and the tiny model's fused q_a_proj and kv_a_proj have 288.
    ("a100", "deepseek_v3"): (("q_lora_rank", 160),),
}


@dataclass(frozen=True)
class Case:
    """One way of loading.

    Attributes:
        family: of ``workbench.loads.checkpoints``, or an architecture of ``workbench.quality.families``.
        args: fields of SGLang's ``ServerArgs``.
        quantization: as ``--quantization``.
        scheme: as ``SGLANG_STREAMFP8_SCHEME``; empty for stock's.
        refused: what stock says where it does not load that.
        sample: whether each run of the tests has it, and not the nightly alone.
    """

    family: str
    args: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = "fp8"
    scheme: str = ""
    refused: str = ""
    sample: bool = False

    @property
    def name(self) -> str:
        said = [self.family, *self.args.values(), self.scheme, self.quantization, "refused" if self.refused else ""]
        return "-".join(filter(None, map(str, said)))


def experts(backend: str, **fields: Any) -> Case:
    """Qwen3-MoE run by this backend."""
    return Case("qwen3_moe", {"moe_runner_backend": backend}, **fields)


def gemm(backend: str, family: str = "qwen3", **fields: Any) -> Case:
    """Linear layers computed by this backend."""
    return Case(family, {"fp8_gemm_runner_backend": backend}, **fields)


FAMILIES = (Case("qwen3"), Case("qwen3_moe"), Case("deepseek_v3"), Case(GPT_OSS))
NO_BLOCKS = "cutlass_fp8 MoE requires block quantization"
NOT_FOR_FP8 = "Invalid quantization 'fp8'"

CASES: Mapping[Surroundings, tuple[Case, ...]] = {
    Surroundings("a100"): (
        Case("qwen3_moe", sample=True),
        *FAMILIES,
        Case("qwen2_moe"),
        experts("triton"),
        gemm("triton"),
        Case("qwen3", scheme="channel"),
        Case("qwen3", scheme="block"),
        Case("qwen3_moe", scheme="block"),
        experts("cutlass", refused="cutlass_fp8 MoE requires CUDA 12.0+"),
    ),
    Surroundings("h200", variables=(("SGLANG_FORCE_FP8_MARLIN", "1"),)): (
        Case("qwen3"),
        Case("qwen3_moe"),
        Case("qwen2_moe"),
        Case("qwen3", scheme="block"),
    ),
    Surroundings("h200", BOTH): (
        *FAMILIES,
        *(experts(backend) for backend in ("triton", "deep_gemm")),
        *(gemm(backend) for backend in ("triton", "deep_gemm", "flashinfer_deepgemm")),
        Case("qwen3", scheme="channel"),
        Case("qwen3", scheme="tensor"),
        Case("qwen3_moe", scheme="tensor"),
        Case("qwen3", scheme="block"),
        Case("qwen3_moe", scheme="block"),
        *(experts(backend, scheme="block") for backend in ("deep_gemm", "cutlass")),
        experts("hpc_ops", scheme="block"),
        experts("cutlass", refused=NO_BLOCKS),
        experts("flashinfer_cutlass", refused=NOT_FOR_FP8),
    ),
    Surroundings("b200", BOTH): (
        *FAMILIES,
        *(experts(backend) for backend in ("triton", "deep_gemm", "flashinfer_trtllm", "flashinfer_trtllm_routed")),
        *(gemm(backend) for backend in ("triton", "deep_gemm", "flashinfer_trtllm", "flashinfer_cutlass")),
        experts("deep_gemm", scheme="block", sample=True),
        experts("triton", scheme="block"),
        experts("flashinfer_trtllm", scheme="block"),
        Case("qwen3", scheme="channel"),
        Case("qwen3", scheme="tensor"),
        Case("qwen3", scheme="block"),
        gemm("flashinfer_trtllm", scheme="block"),
        Case("qwen3", quantization="mxfp8"),
        Case("deepseek_v3", quantization="mxfp8"),
        *(gemm(name, quantization="mxfp8") for name in ("deep_gemm", "flashinfer_trtllm", "flashinfer_cutlass")),
        *(experts(name, quantization="mxfp8") for name in ("deep_gemm", "flashinfer_trtllm_routed")),
        experts("flashinfer_trtllm", quantization="mxfp8", sample=True),
        experts("cutlass", refused=NO_BLOCKS),
        experts("flashinfer_cutlass", refused=NOT_FOR_FP8, sample=True),
    ),
    Surroundings("rtx5090", BOTH): (
        *FAMILIES,
        *(experts(backend) for backend in ("triton", "deep_gemm")),
        Case("qwen3", scheme="channel"),
        Case("qwen3", scheme="block"),
        experts("triton", scheme="block"),
    ),
    Surroundings("l4", ("flashinfer",)): (
        Case("qwen3"),
        Case(GPT_OSS),
        experts("triton"),
        gemm("triton"),
        Case("qwen3", scheme="channel"),
        Case("qwen3", scheme="block"),
        experts("triton", scheme="block"),
    ),
}


def _params(*, updated: bool = False) -> Iterator[Any]:
    for there, cases in CASES.items():
        for case in cases:
            if updated and (case.refused or case.family == GPT_OSS):
                continue
            # What Blackwell has came release by release: its sample is the newest's.
            sample = [] if there.gpu == "b200" else [pytest.mark.every_release]
            marks = sample if case.sample else [pytest.mark.nightly]
            said = [there.gpu, *(f"{name}={value}" for name, value in there.variables), case.name]
            yield pytest.param(there, case, id=" ".join(said), marks=marks)


@pytest.fixture
def path_of(checkpoint: Callable[..., Path], checkpoint_folder: Path) -> Callable[[str, str], Path]:
    """``path_of(gpu, family)``."""

    def path(gpu: str, family: str) -> Path:
        if family == GPT_OSS:
            return families.build(family, checkpoint_folder)
        return checkpoint(family, files=3, assignment="round_robin", overrides=OVERRIDES.get((gpu, family), ()))

    return path


@pytest.mark.parametrize(("there", "case"), [*_params()])
def test_backend_is_given_what_stock_gives_it(there, case, loads_in, path_of, tmp_path):
    job = job_of(case, path_of(there.gpu, case.family))
    stock = replace(stock_of(case, job, tmp_path), streaming="0", environ={})
    if case.refused:
        for refused in (stock, job):
            with pytest.raises(LoadFailed, match=case.refused.replace("+", r"\+")):
                loads_in(there, refused)
        return
    found = compare(loads_in(there, stock), loads_in(there, job))
    # How stock was made to take one scale a matrix can be seen in its methods in some releases.
    if case.scheme == "tensor":
        found = [line for line in found if ".quant_method.cutlass_fp8_supported: " not in line]
    assert found == []


@pytest.mark.parametrize(("there", "case"), [*_params(updated=True)])
def test_an_update_leaves_what_a_fresh_load_leaves_in_the_same_memory(there, case, loads_in, checkpoint):
    overrides = OVERRIDES.get((there.gpu, case.family), ())
    paths = [
        checkpoint(case.family, files=3, assignment="round_robin", overrides=overrides, seed=seed) for seed in (0, 1)
    ]
    old, new = (job_of(case, path) for path in paths)
    updated = loads_in(there, replace(old, updates=(Update("tensor", paths[1]),)))
    (change,) = updated.ranks[0].updates
    assert (change.success, change.moved) == (True, ()), change.message
    assert compare(loads_in(there, new), updated) == []


def job_of(case: Case, path: Path) -> LoadJob:
    """A load as the case has it."""
    return LoadJob(
        path,
        "require",
        quantization=case.quantization,
        environ={"SGLANG_STREAMFP8_SCHEME": case.scheme} if case.scheme else {},
        device="cuda",
        server_args={**SERVER_ARGS, **case.args},
    )


def stock_of(case: Case, job: LoadJob, folder: Path) -> LoadJob:
    """How stock comes by the same values."""
    if case.scheme in ("", "channel"):
        return job  # A scale a channel is what stock makes of linear layers on all these GPUs.
    if case.scheme == "tensor":
        return replace(job, linear="tensor")
    try:
        run_export(ExportJob(job.checkpoint, folder / "exported", scheme=case.scheme))
    except UnsimulatedReleaseError as error:
        pytest.skip(str(error))
    return replace(job, checkpoint=folder / "exported", quantization=None)
