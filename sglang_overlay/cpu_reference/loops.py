# SPDX-License-Identifier: Apache-2.0
"""The two loops of per-tensor quantization on the CPU, in LLVM's language, and how they become machine code.

Written with whole vectors, so that code generation alone is enough: LLVM cuts them into what the processor has
(AVX-512, AVX2, NEON), and nothing has to find the parallelism first. llvmlite, which SGLang has through numba, does
that in 50 ms and 11 MB; numba itself would take seconds the first time, a cache on disk, and four times the memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CONVERTED = 32
"""Elements converted at a time."""

COMPARED = 128
"""Elements compared at a time."""

_FLOAT_BITS = 23
_FP8_BITS = 3
_DROPPED = _FLOAT_BITS - _FP8_BITS
"""Bits of a float32's mantissa that fp8 has no place for."""

_FLOAT_BIAS, _FP8_BIAS = 127, 7
_SMALLEST_NORMAL = (_FLOAT_BIAS - _FP8_BIAS + 1) << _FLOAT_BITS
_REBIASED_HALF = ((_FP8_BIAS - _FLOAT_BIAS) << _FLOAT_BITS) + (1 << (_DROPPED - 1)) - 1
"""Changes the exponent's bias and adds just under half of the last place that is kept."""

_LIFT = 2 ** (_FLOAT_BITS - _FP8_BITS - _FP8_BIAS + 1)
"""A float32 of this size has its last place where a subnormal fp8 has its own, so that adding it rounds there."""

_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14 and later; kernels without it refuse, and nothing is lost."""

_LIFT_BITS = (_FLOAT_BIAS + _LIFT.bit_length() - 1) << _FLOAT_BITS


@dataclass(frozen=True)
class Loops:
    """Compiled loops over matrices whose rows are contiguous; both run without Python's lock.

    Attributes:
        convert: ``(lanes) -> f(values, stride, out, out stride, rows, columns, multiplier)``; columns in
            steps of lanes.
        largest: ``(lanes) -> f(values, stride, rows, columns)``: the largest magnitude's bits as bfloat16.
        populate: ``f(out, out stride, rows, columns)`` gives memory its pages at once. A fault for each of them takes
            nearly twice as long, and half of a load.
    """

    convert: dict[int, Callable[..., None]]
    largest: dict[int, Callable[..., int]]
    populate: Callable[..., None]
    engine: Any
    """Owns the machine code."""


def compile_loops() -> Loops:
    """The loops for this processor. Needs llvmlite."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    processor = llvm.Target.from_default_triple().create_target_machine(
        opt=3, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
    )
    sources = [
        _populate(),
        *(_convert(lanes) for lanes in (CONVERTED, 1)),
        *(_largest(lanes) for lanes in (COMPARED, 1)),
    ]
    module = llvm.parse_assembly("\n".join(sources))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, processor)
    engine.finalize_object()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    convert = ctypes.CFUNCTYPE(None, pointer, size, pointer, size, size, size, ctypes.c_float)
    largest = ctypes.CFUNCTYPE(ctypes.c_uint16, pointer, size, size, size)
    populate = ctypes.CFUNCTYPE(None, pointer, size, size, size)
    return Loops(
        {lanes: convert(engine.get_function_address(f"convert_{lanes}")) for lanes in (CONVERTED, 1)},
        {lanes: largest(engine.get_function_address(f"largest_{lanes}")) for lanes in (COMPARED, 1)},
        populate(engine.get_function_address("populate")),
        engine,
    )


def _populate() -> str:
    madvise = ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value
    return f"""
define void @populate(ptr %out, i64 %stride, i64 %rows, i64 %columns) {{
  %begin = ptrtoint ptr %out to i64
  %first = and i64 %begin, {-mmap.PAGESIZE}
  %before = sub i64 %begin, %first
  %strides = sub i64 %rows, 1
  %skipped = mul i64 %strides, %stride
  %through = add i64 %before, %columns
  %size = add i64 %skipped, %through
  %page = inttoptr i64 %first to ptr
  %refused = call i32 inttoptr (i64 {madvise} to ptr)(ptr %page, i64 %size, i32 {_POPULATE_WRITE})
  ret void
}}
"""


def _convert(lanes: int) -> str:
    """``out = fp8(values * multiplier)``, rounded to nearest, ties to even; the product is rounded to float32 first."""
    ints, floats = f"<{lanes} x i32>", f"<{lanes} x float>"

    def each(value: int) -> str:
        return f"<{', '.join([f'i32 {value}'] * lanes)}>"

    return f"""
define void @convert_{lanes}(ptr %values, i64 %stride, ptr %out, i64 %out_stride, i64 %rows, i64 %columns, float %by) {{
entry:
  %first = insertelement {floats} poison, float %by, i64 0
  %multiplier = shufflevector {floats} %first, {floats} poison, {ints} zeroinitializer
  call void @populate(ptr %out, i64 %out_stride, i64 %rows, i64 %columns)
  br label %row
row:
  %r = phi i64 [0, %entry], [%next_r, %row_done]
  %skipped = mul i64 %r, %stride
  %row_values = getelementptr i16, ptr %values, i64 %skipped
  %out_skipped = mul i64 %r, %out_stride
  %row_out = getelementptr i8, ptr %out, i64 %out_skipped
  br label %block
block:
  %c = phi i64 [0, %row], [%next_c, %block]
  %from = getelementptr i16, ptr %row_values, i64 %c
  %bfloats = load <{lanes} x i16>, ptr %from, align 2
  %wide = zext <{lanes} x i16> %bfloats to {ints}
  %shifted = shl {ints} %wide, {each(16)}
  %value = bitcast {ints} %shifted to {floats}
  %product = fmul {floats} %value, %multiplier
  %bits = bitcast {floats} %product to {ints}
  %magnitude = and {ints} %bits, {each(0x7FFFFFFF)}
  %kept = lshr {ints} %magnitude, {each(_DROPPED)}
  %odd = and {ints} %kept, {each(1)}
  %half_up = add {ints} %magnitude, {each(_REBIASED_HALF)}
  %even_up = add {ints} %half_up, %odd
  %normal = lshr {ints} %even_up, {each(_DROPPED)}
  %absolute = bitcast {ints} %magnitude to {floats}
  %lift = bitcast {ints} {each(_LIFT_BITS)} to {floats}
  %lifted = fadd {floats} %absolute, %lift
  %lifted_bits = bitcast {floats} %lifted to {ints}
  %subnormal = sub {ints} %lifted_bits, {each(_LIFT_BITS)}
  %is_small = icmp ult {ints} %magnitude, {each(_SMALLEST_NORMAL)}
  %code = select <{lanes} x i1> %is_small, {ints} %subnormal, {ints} %normal
  %top = lshr {ints} %bits, {each(24)}
  %sign = and {ints} %top, {each(0x80)}
  %signed = or {ints} %code, %sign
  %bytes = trunc {ints} %signed to <{lanes} x i8>
  %to = getelementptr i8, ptr %row_out, i64 %c
  store <{lanes} x i8> %bytes, ptr %to, align 1
  %next_c = add i64 %c, {lanes}
  %more_c = icmp ult i64 %next_c, %columns
  br i1 %more_c, label %block, label %row_done
row_done:
  %next_r = add i64 %r, 1
  %more_r = icmp ult i64 %next_r, %rows
  br i1 %more_r, label %row, label %done
done:
  ret void
}}
"""


def _largest(lanes: int) -> str:
    """The largest magnitude: bfloat16 without their signs are ordered as integers, NaN above all."""
    vector = f"<{lanes} x i16>"
    unsigned = f"<{', '.join(['i16 32767'] * lanes)}>"
    return f"""
declare {vector} @llvm.umax.v{lanes}i16({vector}, {vector})
declare i16 @llvm.vector.reduce.umax.v{lanes}i16({vector})
define i16 @largest_{lanes}(ptr %values, i64 %stride, i64 %rows, i64 %columns) {{
entry:
  br label %row
row:
  %r = phi i64 [0, %entry], [%next_r, %row_done]
  %row_most = phi {vector} [zeroinitializer, %entry], [%most, %row_done]
  %skipped = mul i64 %r, %stride
  %row_values = getelementptr i16, ptr %values, i64 %skipped
  br label %block
block:
  %c = phi i64 [0, %row], [%next_c, %block]
  %so_far = phi {vector} [%row_most, %row], [%most, %block]
  %from = getelementptr i16, ptr %row_values, i64 %c
  %bfloats = load {vector}, ptr %from, align 2
  %magnitude = and {vector} %bfloats, {unsigned}
  %most = call {vector} @llvm.umax.v{lanes}i16({vector} %so_far, {vector} %magnitude)
  %next_c = add i64 %c, {lanes}
  %more_c = icmp ult i64 %next_c, %columns
  br i1 %more_c, label %block, label %row_done
row_done:
  %next_r = add i64 %r, 1
  %more_r = icmp ult i64 %next_r, %rows
  br i1 %more_r, label %row, label %done
done:
  %result = call i16 @llvm.vector.reduce.umax.v{lanes}i16({vector} %most)
  ret i16 %result
}}
"""
