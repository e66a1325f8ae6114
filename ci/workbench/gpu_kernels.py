# SPDX-License-Identifier: Apache-2.0
"""SGLang's quantization kernels on a GPU against the stand-in GPU's emulations of them, and copies to the GPU."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.plan.replacing import replaced
from workbench import gpu_modules

emulations: Any = importlib.import_module("standin.kernels")
"""Of the stand-in GPU, under ``tests/``."""

Checked = tuple[str, bool, str, dict[str, Any]]
"""What was checked, whether it passed, what there is to say, and figures."""
Kernel = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Quantizes ``[rows, columns]``, to e4m3 of that shape and float32 scales."""

ROWS = (1024, 2111, 2112, 2113, 4096, 6144)
"""From 16 rows a multiprocessor on, of which an H200 has 132, the row quantizer has a warp for each."""
COLUMNS = (2048, 260)
"""Loaded 16 bytes at a time, and 8."""
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """A kernel of SGLang's and the emulation that has to give its bytes.

    Attributes:
        kernel, emulation: called with input, e4m3 output and float32 scales to write to.
        scales: shape of the scales for so many rows.
        flat: whether both take all three with one dimension.
    """

    name: str
    kernel: Callable[..., Any]
    emulation: Callable[..., Any]
    scales: Callable[[int], tuple[int, ...]]
    flat: bool = False

    def run(self, called: Callable[..., Any], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What kernel or emulation makes of ``values``, in memory that held something else."""
        output = torch.full(values.shape, 0x55, dtype=torch.uint8, device=values.device).view(torch.float8_e4m3fn)
        scale = torch.zeros(self.scales(len(values)), dtype=torch.float32, device=values.device)
        called(*((values.view(-1), output.view(-1), scale.view(-1)) if self.flat else (values, output, scale)))
        return output, scale


def checked(work: Path) -> Iterator[Checked]:
    """All of it, on the current GPU."""
    for comparison in comparisons():
        for rows in ROWS:
            for columns in COLUMNS[:1] if comparison.flat else COLUMNS:
                yield _compared(comparison, rows, columns)
        if not comparison.flat:
            yield _in_pieces(comparison)
    yield from _copies(work)


def comparisons() -> Iterator[Comparison]:
    """The kernels that stock's and streaming's loads call, and the row quantizer of the newest release."""
    aot: Any = importlib.import_module("sgl_kernel")
    from sglang.kernels.ops.quantization.per_tensor_quant_fp8 import per_tensor_quant_fp8

    by_row: dict[str, Any] = {"emulation": emulations.per_token_quant_fp8, "scales": lambda rows: (rows, 1)}
    yield Comparison("row quantizer of sglang-kernel", aot.sgl_per_token_quant_fp8, **by_row)
    if headers := os.environ.get(gpu_modules.SOURCES_VARIABLE):
        module = gpu_modules.row_kernels(Path(headers))
        yield Comparison("row quantizer of the newest release", module.per_token_quant_fp8, **by_row)
    tensor = emulations.per_tensor_quant_fp8
    yield Comparison("one scale a matrix", per_tensor_quant_fp8, tensor, lambda _: (1,), flat=True)


def samples(rows: int, columns: int) -> torch.Tensor:
    """bf16 ``[rows, columns]`` on the GPU: rows of many magnitudes, with zero, NaN, infinite and tiny ones."""
    seeded = torch.Generator("cuda").manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=seeded, device="cuda")
    values *= torch.exp(4 * torch.randn(rows, 1, generator=seeded, device="cuda"))
    values[0:8] = 0
    values[8, 5] = torch.nan
    values[9] = torch.nan
    values[10, 7] = torch.inf
    values[11:14] *= 1e-30
    # Below the smallest normal number of float32, and at it.
    values[14] = 1e-39
    values[15] = 2.0**-126
    values[16] = -0.0
    return values.to(torch.bfloat16)


def _compared(comparison: Comparison, rows: int, columns: int) -> Checked:
    values = samples(rows, columns)
    if comparison.flat:
        # One scale of all: what is not finite would leave nothing to compare.
        values = torch.nan_to_num(values, nan=0.0, posinf=0.0)
    real = comparison.run(comparison.kernel, values)
    with on_real_gpu() as mirrors:
        emulated = comparison.run(comparison.emulation, values)
        expected = [mirrors.get(tensor.data_ptr(), tensor.cpu()) for tensor in emulated]
    differing = [_differing(one, other) for one, other in zip(real, expected, strict=True)]
    what = f"{comparison.name}, {rows} x {columns}"
    passed = not any(len(found) for found in differing)
    return what, passed, "the emulation's bytes" if passed else _told(differing, values), {}


def _differing(real: torch.Tensor, emulated: torch.Tensor) -> torch.Tensor:
    """Rows in which two outputs differ in any byte."""
    one, other = (part.cpu().contiguous().view(torch.uint8).view(len(part), -1) for part in (real, emulated))
    return (one != other).any(dim=1).nonzero().flatten()


def _told(differing: list[torch.Tensor], values: torch.Tensor) -> str:
    """How many rows differ in values and in scales, and what is special about the first of them."""
    first = {int(row) for found in differing for row in found[:6]}
    largest = ", ".join(f"row {row} (up to {float(values[row].abs().max()):.3g})" for row in sorted(first))
    return f"values of {len(differing[0])} rows and {len(differing[1])} scales differ from the emulation's: {largest}"


def _in_pieces(comparison: Comparison) -> Checked:
    """A weight as a whole, and in two halves: the kernel's rule of which variant is picked shows in rows of zeros."""
    values = samples(2560, COLUMNS[0])
    whole, _ = comparison.run(comparison.kernel, values)
    halves = torch.cat([comparison.run(comparison.kernel, half.contiguous())[0] for half in values.chunk(2)])
    rows = {int(row) for row in _differing(whole, halves)}
    zeros = {int(row) for row in (values == 0).all(dim=1).nonzero().flatten()}
    detail = f"{len(rows)} rows differ, {len(zeros)} rows are zeros"
    return f"{comparison.name}, 2560 rows and in halves", rows <= zeros, detail, {}


@contextmanager
def on_real_gpu() -> Iterator[dict[int, torch.Tensor]]:
    """Lets emulations, which write to the stand-in's memory, work on copies of a real GPU's: by address, in here."""
    mirrors: dict[int, torch.Tensor] = {}

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in mirrors:
            mirrors[tensor.data_ptr()] = tensor.cpu()
        return mirrors[tensor.data_ptr()]

    with replaced(emulations, "on_host", on_host):
        yield mirrors


def _copies(work: Path) -> Iterator[Checked]:
    """Rates of copies to the GPU out of ordinary, mapped and pinned memory."""
    from safetensors.torch import load_file, save_file

    plain = torch.ones(COPY_BYTES, dtype=torch.uint8)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file = Path(folder) / "copied.safetensors"
        save_file({"all": plain}, file)
        sources = {"ordinary": plain, "mapped": load_file(file)["all"], "pinned": plain.pin_memory()}
        for name, source in sources.items():
            rates = [_rate(source) for _ in range(3)]
            said = ", ".join(f"{rate:.1f}" for rate in rates)
            yield f"copies of 1 GiB out of {name} memory", True, f"{said} GB/s", {"rates": rates}


def _rate(source: torch.Tensor) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    source.to("cuda")
    torch.cuda.synchronize()
    return source.nbytes / (time.perf_counter() - begin) / 1e9
