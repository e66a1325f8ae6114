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

from sglang_overlay.offline.plan.replacing import replaced
from workbench.gpu import gpu_modules

emulations: Any = importlib.import_module("standin.kernels")
"""Folder of the stand-in GPU, under ``tests/``."""

Checked = tuple[str, bool, str, dict[str, Any]]
"""What was checked, whether it passed, details, and figures."""
Kernel = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Quantizes ``[rows, columns]``, to e4m3 of that shape and float32 scales."""

ROWS = (1024, 2111, 2112, 2113, 4096, 6144)
"""From 16 rows per multiprocessor on, of which an H200 has 132, the row quantizer assigns a warp to each row."""
COLUMNS = (2048, 260)
"""Sizes with loads of 16 bytes, and of 8."""
VALUE_STEPS, SCALE_STEPS = 1, 2
"""By how many representable numbers a kernel may differ from its emulation: on Hopper kernels are compiled with
``--use_fast_math``, whose divisions are not emulated. All differences are reported.
"""
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """A kernel of SGLang's and the emulation that must give the same bytes.

    Attributes:
        kernel, emulation: called with input, e4m3 output and float32 scales to write to.
        scales: returns the shape of the scales for a number of rows.
        flat: whether both take all three tensors with one dimension.
    """

    name: str
    kernel: Callable[..., Any]
    emulation: Callable[..., Any]
    scales: Callable[[int], tuple[int, ...]]
    flat: bool = False

    def run(self, called: Callable[..., Any], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's or the emulation's e4m3 values and scales for ``values``, written over other contents."""
        output = torch.full(values.shape, 0x55, dtype=torch.uint8, device=values.device).view(torch.float8_e4m3fn)
        scale = torch.zeros(self.scales(len(values)), dtype=torch.float32, device=values.device)
        called(*((values.view(-1), output.view(-1), scale.view(-1)) if self.flat else (values, output, scale)))
        return output, scale


def checked(work: Path) -> Iterator[Checked]:
    """Run all checks on the current GPU."""
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
    """bf16 ``[rows, columns]`` on the GPU: rows of many magnitudes, some with zeros, NaN, infinities or tiny values."""
    seeded = torch.Generator("cuda").manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=seeded, device="cuda")
    values *= torch.exp(4 * torch.randn(rows, 1, generator=seeded, device="cuda"))
    values[0:8] = 0
    values[8, 5] = torch.nan
    values[9] = torch.nan
    values[10, 7] = torch.inf
    values[11:14] *= 1e-30
    # Below the smallest normal number of float32, and exactly that.
    values[14] = 1e-39
    values[15] = 2.0**-126
    values[16] = -0.0
    return values.to(torch.bfloat16)


def _compared(comparison: Comparison, rows: int, columns: int) -> Checked:
    what = f"{comparison.name}, {rows} x {columns}"
    try:
        passed, detail, figures = _comparison_of(comparison, samples(rows, columns))
    except Exception as error:
        return what, False, f"{type(error).__name__}: {error}", {}
    return what, passed, detail, figures


def _comparison_of(comparison: Comparison, values: torch.Tensor) -> tuple[bool, str, dict[str, Any]]:
    if comparison.flat:
        # With a single scale, values that are not finite would leave nothing to compare.
        values = torch.nan_to_num(values, nan=0.0, posinf=0.0)
    real = comparison.run(comparison.kernel, values)
    with on_real_gpu() as mirrors:
        emulated = comparison.run(comparison.emulation, values)
        expected = [mirrors[tensor.data_ptr()].view(tensor.shape) for tensor in emulated]
    steps = [_steps(one, other) for one, other in zip(real, expected, strict=True)]
    figures = {"rows_of_other_values": int((steps[0] > 0).sum()), "other_scales": int((steps[1] > 0).sum())}
    passed = bool((steps[0] <= VALUE_STEPS).all() and (steps[1] <= SCALE_STEPS).all())
    return passed, _told(steps, values) if any(figures.values()) else "the emulation's bytes", figures


def _steps(real: torch.Tensor, emulated: torch.Tensor) -> torch.Tensor:
    """For each row, the largest difference of two outputs in representable numbers; 0 if all bytes are equal."""
    kind = torch.uint8 if real.dtype == torch.float8_e4m3fn else torch.int32
    one, other = (part.cpu().contiguous().view(kind).view(len(part), -1).long() for part in (real, emulated))
    return (one - other).abs().amax(dim=1)


def _told(steps: list[torch.Tensor], values: torch.Tensor) -> str:
    """A message: how many rows differ from the emulation, and which differ most."""
    told = []
    for what, found in zip(("rows of values", "scales"), steps, strict=True):
        worst = [row for row in found.argsort(descending=True)[:6].tolist() if found[row]]
        said = ", ".join(f"row {row} by {int(found[row])} (up to {_largest(values, row):.3g})" for row in worst)
        told.append(f"{int((found > 0).sum())} {what} differ from the emulation's{': ' if worst else ''}{said}")
    return "; ".join(told)


def _largest(values: torch.Tensor, row: int) -> float:
    return float((values[row] if values.dim() > 1 else values).abs().max())


def _in_pieces(comparison: Comparison) -> Checked:
    """Quantize a weight at once and in two halves: rows of zeros show which variant the kernel picks."""
    values = samples(2560, COLUMNS[0])
    whole, _ = comparison.run(comparison.kernel, values)
    halves = torch.cat([comparison.run(comparison.kernel, half.contiguous())[0] for half in values.chunk(2)])
    rows = set(_steps(whole, halves).nonzero().flatten().tolist())
    zeros = set((values == 0).all(dim=1).nonzero().flatten().tolist())
    detail = f"{len(rows)} rows differ, {len(zeros)} rows are zeros"
    return f"{comparison.name}, 2560 rows and in halves", rows <= zeros, detail, {}


@contextmanager
def on_real_gpu() -> Iterator[dict[int, torch.Tensor]]:
    """Make emulations, which write to host memory, work on host copies of a real GPU's tensors, by their addresses."""
    mirrors: dict[int, torch.Tensor] = {}

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in mirrors:
            mirrors[tensor.data_ptr()] = tensor.cpu()
        return mirrors[tensor.data_ptr()]

    with replaced(emulations, "on_host", on_host):
        yield mirrors


def _copies(work: Path) -> Iterator[Checked]:
    """Rates of copies to the GPU from pageable, mapped and pinned memory."""
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
