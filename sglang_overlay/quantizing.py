# SPDX-License-Identifier: Apache-2.0
"""``sglang_overlay.quantize``: the values and scales that a server makes of high-precision weights, for trainers.

The quantizers are those of loads (``schemes/``). What is served as one weight, and how ranks share it, is told from
checkpoint names: a trainer has no SGLang model to ask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sglang_overlay.core.messages import shortened
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.cpu_reference.executor import on_cpu
from sglang_overlay.errors import QuantizeError, SchemeError
from sglang_overlay.hooks import scheme_hooks
from sglang_overlay.schemes import mxfp8, registry
from sglang_overlay.schemes.choice import MXFP8, NONE, STOCK, SchemeChoice, parse
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.update.tensor_groups import FUSED_BY_THE_MODEL

FUSED = {**scheme_hooks.FUSED, **FUSED_BY_THE_MODEL, "w13": ("w1", "w3")}
"""What is served as one weight, and the checkpoint's names of its parts, in the served order."""
ROWS, COLUMNS = 0, 1
SPLIT = {
    **dict.fromkeys(("qkv_proj", "gate_up_proj", "w13", "q_proj", "q_b_proj"), ROWS),
    **dict.fromkeys(("o_proj", "down_proj", "w2"), COLUMNS),
    **dict.fromkeys(("kv_a_proj_with_mqa", *FUSED_BY_THE_MODEL), None),
}
"""Layers that are quantized, by the last part of their names, and which dimension ranks divide; None if neither."""

_NAME = re.compile(r"(?P<parent>.+)\.(?P<part>\w+)\.weight")
_MLA_WITH_WHOLE_QUERIES = {"q_proj", "kv_a_proj_with_mqa"}


def quantize(
    tensors: Mapping[str, torch.Tensor],
    scheme: str = STOCK,
    *,
    tp_size: int = 1,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Quantize weights exactly as a server does that loads them with this package; the bits are the same.

    For trainers that train on what is served, or send values with scales: half the bytes of bf16. Call it with all
    tensors that are served as one, for example layer by layer, on the kind of device that serves.

    ``weight`` ``[N, K]`` becomes values of the same shape, and scales beside it:

    ============================ ======================= ========== ============================
    scheme                       name                    dtype      shape
    ============================ ======================= ========== ============================
    ``block``                    ``weight_scale_inv``    float32    ``[N / 128, K / 128]``
    ``channel``, ``int8``        ``weight_scale``        float32    ``[N, 1]``
    ``tensor``                   ``weight_scale``        float32    ``[]``
    ``stock``                    ``weight_scale``        float32    as ``channel`` or ``tensor``
    ``mxfp8``                    ``weight_scale_inv``    uint8      ``[N, K / 32]``, exponents
    ============================ ======================= ========== ============================

    Under ``tensor`` and ``stock``, ranks quantize their shares of a weight on their own. Values are then those of all
    ranks, each with the scales of the rank that has them; where ranks differ in scales, there is one more dimension at
    the end, and ``scales[..., rank]`` is what that rank takes. All other schemes give the same for any ``tp_size``.

    Args:
        tensors: high-precision tensors, whole, under their checkpoint names. Those that are not quantized stay as they
            are, and so do weights of unknown names: a server takes these in high precision, and quantizes them itself.
        scheme: as ``SGLANG_STREAMFP8_SCHEME`` takes it, or ``mxfp8``. ``stock`` is SGLang's own choice for this
            process's GPU. A scheme of another package needs a ``SerializedPlan``, and has to be one that can be
            exported (``Scheme.stored``).
        tp_size: number of ranks that share each weight: of experts, without expert parallelism; of attention, without
            data parallelism.
        kv_heads: number of key-value heads of the model; needed under ``tensor`` and ``stock`` with several ranks.
        dtype: of the served model; tensors are cast to it first, as when they are loaded.

    Returns:
        ``tensors`` in the same order, with each quantized weight replaced, and followed by its scales.

    Raises:
        QuantizeError: a part of what is served with one scale is missing, ranks cannot share it, the scheme does not
            fit its size, or nothing tells how the scheme stores a weight.
        SchemeError: there is no such scheme, or not for this kind of layer.
    """
    choice = SchemeChoice(MXFP8, MXFP8) if scheme == MXFP8 else parse(scheme, "scheme")
    if scheme != MXFP8:
        registry.check(choice)
    made: dict[str, dict[str, torch.Tensor]] = {}
    for layer in _layers(tensors):
        name = _scheme_of(layer, choice)
        if name != NONE:
            try:
                made.update(_quantized(layer, _form(name, layer.kind), tp_size, kv_heads, dtype))
            except ValueError as error:
                raise QuantizeError(f"{layer.names[0]} as {name!r}: {error}") from error
    return {key: value for name in tensors for key, value in made.get(name, {name: tensors[name]}).items()}


@dataclass(frozen=True)
class _Layer:
    """What is served as one weight; an expert's w13 or w2.

    Attributes:
        names: of the layer, as in the server, and the checkpoint's of its parts if it is fused.
        parts: its tensors, by their own names, in the served order.
        missing: names of parts that are not there.
        is_fused: whether it is one tensor of what others have as several.
        split: the dimension that ranks divide, or None.
    """

    names: Sequence[str]
    kind: LayerKind
    parts: Mapping[str, torch.Tensor]
    missing: Sequence[str]
    is_fused: bool
    split: int | None


def _layers(tensors: Mapping[str, torch.Tensor]) -> Iterator[_Layer]:
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found and tensor.ndim == 2 and tensor.is_floating_point():
            matrices.setdefault(found["parent"], {})[found["part"]] = tensor
    for parent, present in matrices.items():
        for last in dict.fromkeys(_served_in(part, present) for part in present):
            if last in SPLIT:
                yield _layer(parent, last, present)


def _served_in(part: str, present: Collection[str]) -> str:
    """The last part of the name of the layer that has the tensor ``part``, beside those that are ``present``."""
    if part in _MLA_WITH_WHOLE_QUERIES and set(present) >= _MLA_WITH_WHOLE_QUERIES:
        return part
    layers = [layer for layer, parts in FUSED.items() if part in parts]
    whole = [layer for layer in layers if all(each in present for each in FUSED[layer])]
    return max(whole, key=lambda layer: len(FUSED[layer]), default=next(iter(layers), part))


def _layer(parent: str, last: str, present: Mapping[str, torch.Tensor]) -> _Layer:
    expert = re.fullmatch(r"(.+\.experts)\.\d+", parent)
    is_whole = last in present
    parts = (last,) if is_whole else FUSED[last]
    fused = () if is_whole else tuple(f"{parent}.{part}" for part in parts)
    return _Layer(
        names=[expert[1]] if expert else [f"{parent}.{last}", *fused],
        kind=LayerKind.EXPERTS if expert else LayerKind.LINEAR,
        parts={f"{parent}.{part}.weight": present[part] for part in parts if part in present},
        missing=[f"{parent}.{part}.weight" for part in parts if part not in present],
        is_fused=is_whole and last in FUSED,
        split=SPLIT[last],
    )


def _scheme_of(layer: _Layer, choice: SchemeChoice) -> str:
    pattern = choice.override(layer.names)
    if pattern is not None:
        return choice.overrides[pattern]
    return choice.linear if layer.kind is LayerKind.LINEAR else choice.moe


@dataclass(frozen=True)
class _Form:
    """How a scheme stores a weight.

    Attributes:
        quantizer: for a weight of so many rows.
        scale: suffix of the scales' name.
        scale_shape: maps a weight's shape to that of its scales.
        covers: what a scale is made of: a rank's share of the whole ``weight`` or of a ``row``; ``any``, where it does
            not matter what ranks share; ``any_row``, where it does not either, but a rank's rows select the kernel.
        rows: number of rows that share scales.
        dtype: of the values.
        scale_dtype: of the scales.
    """

    quantizer: Callable[[int], UnitQuantizer]
    scale: str
    scale_shape: Callable[[Sequence[int]], tuple[int, ...]]
    covers: Literal["weight", "row", "any_row", "any"] = "any"
    rows: int = 1
    dtype: torch.dtype = torch.float8_e4m3fn
    scale_dtype: torch.dtype = torch.float32

    def is_by_rank(self, split: int | None) -> bool:
        """Whether ranks that divide a weight along the dimension ``split`` quantize each its own share."""
        if split is None or self.covers == "any":
            return False
        return self.covers != "any_row" or split == ROWS

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and scales of a weight that is served as one, ``[N, K]``."""
        values = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scales = torch.empty(self.scale_shape(weight.shape), dtype=self.scale_dtype, device=weight.device)
        quantizer = self.quantizer(len(weight))
        if weight.is_cpu:
            quantizer = on_cpu(quantizer)
        quantizer.quantize_run(weight.unsqueeze(0), values.unsqueeze(0), scales.view(1, -1))
        return values, scales


def _form(name: str, kind: LayerKind) -> _Form:
    from sglang_overlay.schemes.serialized_plan import SerializedPlan

    if name == MXFP8:
        plan = mxfp8.Mxfp8LinearPlan() if kind is LayerKind.LINEAR else mxfp8.Mxfp8ExpertsPlan()
        return _Form(_any_rows(plan.quantizer()), "_scale_inv", _groups, scale_dtype=torch.uint8)
    if name == STOCK:
        return _stock_form(name, kind)
    scheme = registry.find(name)
    reason = scheme.why_not(kind)
    if reason is not None:
        raise SchemeError(f"the quantization scheme {name!r} is not for {kind.value} layers: {reason}")
    if name == "tensor" or (name == "channel" and kind is LayerKind.LINEAR):
        return _stock_form(name, kind)
    serialized, stored = scheme.plan(kind, None), scheme.stored()
    if not isinstance(serialized, SerializedPlan) or (stored is None and name != "int8"):
        raise QuantizeError(f"nothing tells how the quantization scheme {name!r} stores a weight")
    quantizer = _any_rows(serialized.quantizer())
    if stored is None:
        return _Form(quantizer, "_scale", _rows, dtype=torch.int8)
    return _Form(quantizer, stored.scale, stored.scale_shape, rows=stored.rows, dtype=stored.dtype)


def _stock_form(name: str, kind: LayerKind) -> _Form:
    """Of ``stock``, ``tensor``, and ``channel`` in linear layers."""
    from sglang.srt.layers.quantization import fp8

    from sglang_overlay.schemes.stock_experts import ExpertsPlan
    from sglang_overlay.schemes.stock_linear import LinearPlan, is_per_channel

    if kind is LayerKind.EXPERTS:
        return _Form(_any_rows(ExpertsPlan().quantizer()), "_scale", _one, "weight", dtype=fp8.fp8_dtype)
    per_channel = name == "channel" or (name == STOCK and is_per_channel(fp8.Fp8LinearMethod(fp8.Fp8Config())))
    quantizer = LinearPlan(per_channel=per_channel).quantizer
    if not per_channel:
        return _Form(quantizer, "_scale", _one, "weight", dtype=fp8.fp8_dtype)
    return _Form(quantizer, "_scale", _rows, "row" if name == STOCK else "any_row", dtype=fp8.fp8_dtype)


def _any_rows(quantizer: UnitQuantizer) -> Callable[[int], UnitQuantizer]:
    return lambda _rows: quantizer


def _one(_shape: Sequence[int]) -> tuple[int, ...]:
    # DeepSeek's loader knows one scale for several tensors by its shape.
    return ()


def _rows(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], 1)


def _groups(shape: Sequence[int]) -> tuple[int, ...]:
    if shape[1] % mxfp8.GROUP:
        raise ValueError(f"{shape[1]} columns are not a multiple of {mxfp8.GROUP}")
    return (shape[0], shape[1] // mxfp8.GROUP)


def _quantized(
    layer: _Layer, form: _Form, tp_size: int, kv_heads: int | None, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """For each part of a layer, by its name, values and scales, by theirs."""
    ranks = tp_size if form.is_by_rank(layer.split) else 1
    _refuse(layer, form, ranks, kv_heads)
    parts = {name: tensor.detach().to(dtype) for name, tensor in layer.parts.items()}
    made = {name: torch.empty(part.shape, dtype=form.dtype, device=part.device) for name, part in parts.items()}
    scales: dict[str, list[torch.Tensor]] = {name: [] for name in parts}
    for rank in range(ranks):
        shares = [_share(part, layer.split, rank, ranks) for part in parts.values()]
        values, factors = form.quantize(torch.cat(shares))
        if form.covers == "weight":
            by_part: Sequence[torch.Tensor] = [factors] * len(shares)
        else:
            by_part = factors.split([form.scale_shape(share.shape)[0] for share in shares])
        for name, part, scale in zip(parts, values.split([len(share) for share in shares]), by_part, strict=True):
            _share(made[name], layer.split, rank, ranks).copy_(part)
            scales[name].append(scale)
    is_apart = form.covers == "weight" or layer.split == COLUMNS
    return {name: {name: made[name], name + form.scale: _joined(scales[name], is_apart)} for name in parts}


def _joined(scales: Sequence[torch.Tensor], is_apart: bool) -> torch.Tensor:  # noqa: FBT001
    """The scales that all ranks have found for a tensor, in memory of their own."""
    if len(scales) == 1:
        return scales[0].clone()
    return torch.stack(list(scales), -1) if is_apart else torch.cat(list(scales))


def _refuse(layer: _Layer, form: _Form, ranks: int, kv_heads: int | None) -> None:
    """Refuse what these tensors alone do not tell.

    Raises:
        QuantizeError: as of ``quantize``.
    """
    names, what = list(layer.parts), f"{layer.names[0]} is served with one scale"
    if form.covers == "weight" and layer.missing:
        raise QuantizeError(f"{what}: with {shortened(names)} in the same call give {shortened(layer.missing)}")
    for name in names[:-1]:
        if len(layer.parts[name]) % form.rows:
            raise QuantizeError(
                f"{name} {list(layer.parts[name].shape)} ends within a block of {form.rows} rows, whose scale the next "
                f"part of {layer.names[0]} shares. Leave the layer out, and send it in high precision"
            )
    if ranks == 1:
        return
    if layer.names[0].endswith("qkv_proj") and form.covers == "weight" and (kv_heads is None or kv_heads % ranks):
        raise QuantizeError(
            f"{what} a rank, and kv_heads={kv_heads} does not say that each of {ranks} ranks has key-value heads of "
            "its own. Give the model's number; where ranks share heads they scale them differently: send these layers "
            "in high precision"
        )
    for name, part in layer.parts.items():
        if layer.is_fused and form.covers == "weight":
            raise QuantizeError(f"{name} is one tensor, of whose parts each rank has some rows. Give them one by one")
        if part.shape[layer.split or 0] % ranks:
            raise QuantizeError(f"{name} {list(part.shape)} does not divide over {ranks} ranks")


def _share(part: torch.Tensor, split: int | None, rank: int, ranks: int) -> torch.Tensor:
    """The view of ``part`` that a rank has."""
    if ranks == 1 or split is None:
        return part
    size = part.shape[split] // ranks
    return part.narrow(split, rank * size, size)
