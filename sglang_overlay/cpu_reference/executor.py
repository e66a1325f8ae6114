# SPDX-License-Identifier: Apache-2.0
"""How a load works on the CPU: worker threads beside the loader, and compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_overlay.core.executor import Executor
from sglang_overlay.core.quantizers import RowKernelQuantizer, UnitQuantizer, WholeUnitQuantizer
from sglang_overlay.core.whole_rows import WholeRowsQuantizer
from sglang_overlay.cpu_reference.mxfp8 import mxfp8_group_quantize
from sglang_overlay.cpu_reference.per_tensor import KernelArithmetic, PerTensorQuantizer, RatioArithmetic
from sglang_overlay.cpu_reference.workers import Workers, one_thread_each, threads_beside_loader
from sglang_overlay.schemes.arithmetic import row_quantizer
from sglang_overlay.schemes.mxfp8 import GroupQuantizer


class CpuExecutor(Executor):
    """Quantizes in worker threads beside the loader, while ``reading``.

    Attributes:
        quantizes_late: stock would take several times as long, and make copies in float32.
    """

    quantizes_late = True

    def __init__(self) -> None:
        self._workers: Workers | None = None

    def quantizer(self, quantizer: UnitQuantizer) -> UnitQuantizer:
        return on_cpu(quantizer)

    def takes(self, size: int) -> bool:
        return self._workers is not None and self._workers.takes(size)

    def submit(self, job: Callable[[], Any]) -> None:
        assert self._workers is not None
        self._workers.submit(job)

    def check(self) -> None:
        if self._workers is not None:
            self._workers.check()

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._workers = Workers(threads_beside_loader())
        try:
            with one_thread_each():
                yield
        finally:
            self._workers.close()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def on_cpu(quantizer: UnitQuantizer) -> UnitQuantizer:
    """What has the bits of one of upstream's kernels on a CPU, where those cannot run; others as they are."""
    from sglang.srt.layers.quantization import fp8

    limit = torch.finfo(fp8.fp8_dtype).max
    if isinstance(quantizer, WholeRowsQuantizer):
        return quantizer.over(on_cpu(quantizer.quantizer))
    if isinstance(quantizer, RowKernelQuantizer) and quantizer.kernel is fp8.per_token_group_quant_fp8:
        return row_quantizer()
    if isinstance(quantizer, GroupQuantizer) and quantizer.kernel is fp8.mxfp8_group_quantize:
        return GroupQuantizer(mxfp8_group_quantize)
    if isinstance(quantizer, WholeUnitQuantizer) and quantizer.function is fp8.input_to_float8:
        return PerTensorQuantizer(RatioArithmetic(limit))
    if isinstance(quantizer, WholeUnitQuantizer) and quantizer.function is fp8.scaled_fp8_quant:
        return PerTensorQuantizer(KernelArithmetic(limit))
    return quantizer
