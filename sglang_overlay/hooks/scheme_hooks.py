# SPDX-License-Identifier: Apache-2.0
"""The hook around ``Fp8Config.get_quant_method`` of SGLang's ``fp8.py``, which gives layers schemes of this package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any

import torch

from sglang_overlay.errors import SchemeError
from sglang_overlay.hooks import fp8_methods
from sglang_overlay.load import eligibility
from sglang_overlay.load.model_load import current
from sglang_overlay.schemes import registry
from sglang_overlay.schemes.choice import NONE, STOCK, SchemeChoice
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.settings import SCHEME_VARIABLE

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that most models fuse, and the checkpoint's names of their parts; a model may define more."""

CHANNEL = "channel"
OTHERS = {CHANNEL: "tensor"}
"""Which scheme to suggest in place of one that does not fit; ``channel`` for those not listed."""


def get_quant_method(original: Callable[..., Any], config: Any, layer: torch.nn.Module, prefix: str) -> Any:
    """Around ``Fp8Config.get_quant_method``.

    If a scheme replaces stock's method, that is not even created: it refuses backends that cannot serve stock's scheme.

    Raises:
        SchemeError: the layer cannot have the chosen scheme.
    """
    load = current()
    if load is None or load.schemes.is_stock:
        return original(config, layer, prefix)
    kind = _kind(config, layer, prefix)
    if kind is None or not load.admits(config):
        return original(config, layer, prefix)
    names = _names(prefix, config)
    name = load.schemes.scheme_of(kind, names)
    if name == STOCK:
        return original(config, layer, prefix)
    if name == NONE or eligibility.why_deferred(prefix) is not None:
        return _unquantized(original, layer, names)
    scheme = registry.find(name)
    reason = scheme.why_not(kind)
    if reason is not None:
        raise SchemeError(f"{prefix} cannot have the quantization scheme {name!r}: {reason}")
    method = scheme.method(kind, layer, prefix)
    return _streamed(method, kind, scheme.plan(kind, method), prefix, name)


def _kind(config: Any, layer: torch.nn.Module, prefix: str) -> LayerKind | None:
    """The kind of a layer that stock would quantize, else None."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization.fp8 import is_layer_skipped

    kinds = ((LinearBase, LayerKind.LINEAR), (FusedMoE, LayerKind.EXPERTS))
    found = next((kind for base, kind in kinds if isinstance(layer, base)), None)
    if found is None or is_layer_skipped(prefix, config.ignored_layers, fused_mapping=config.packed_modules_mapping):
        return None
    return found


def _names(prefix: str, config: Any) -> Sequence[str]:
    parent, _, last = prefix.rpartition(".")
    parts = {**FUSED, **config.packed_modules_mapping}.get(last, ())
    return [prefix, *(f"{parent}.{part}" for part in parts if part != last)]


def _unquantized(original: Callable[..., Any], layer: torch.nn.Module, names: Sequence[str]) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return original(Fp8Config(ignored_layers=list(names)), layer, names[0])


def _streamed(method: Any, kind: LayerKind, plan: LayerPlan, prefix: str, name: str) -> Any:
    """Make ``method``, which belongs to one layer and the scheme ``name``, load that layer by ``plan``."""
    what = f"{prefix} as {name!r}"
    create, process = method.create_weights, method.process_weights_after_loading

    @functools.wraps(create)
    def create_weights(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        load = current()
        reason = eligibility.why_not_layer(method, layer)
        if load is None or reason is not None:
            raise SchemeError(f"{what}: {reason or 'it is created outside of a load'}")
        call = inspect.signature(create).bind(layer, *args, **kwargs).arguments
        try:
            load.create_weights(functools.partial(create, layer, *args, **kwargs), layer, call["params_dtype"], plan)
        except ValueError as error:
            smaller = _smaller_degrees(method, layer, call)
            instead = what_else(load.schemes.choice, name, kind, prefix.rpartition(".")[2])
            raise SchemeError(f"{what}: {error} {smaller}{instead}") from error

    @functools.wraps(process)
    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        fp8_methods.process_weights_after_loading(lambda _method, layer: process(layer), method, layer)

    method.create_weights = create_weights
    method.process_weights_after_loading = process_weights_after_loading
    return method


def what_else(choice: SchemeChoice, name: str, kind: LayerKind, layer: str) -> str:
    """A message: what to choose for layers of this kind and last name, whose sizes the scheme ``name`` does not fit."""
    bf16, other = f'bf16 with "ignore": ["{layer}"].', OTHERS.get(name, CHANNEL)
    if registry.find(other).why_not(kind) is not None:
        return f"Leave layers of this kind in {bf16}"
    new = choice.with_override(layer, other)
    return f"Give layers of this kind another scheme, {SCHEME_VARIABLE}='{new}', or leave them in {bf16}"


def _smaller_degrees(method: Any, layer: torch.nn.Module, call: Mapping[str, Any]) -> str:
    """A message: the tensor parallel sizes at which all of a layer's sizes are multiples of its scheme's blocks."""
    block = getattr(getattr(method, "quant_config", None), "weight_block_size", None)
    if not block:
        return ""
    height, width = block
    if "output_partition_sizes" in call:
        parts, whole = call["output_partition_sizes"], call["output_size"]
        # SGLang checks columns that ranks split, and rows that ranks split or that are of several fused layers.
        edges = [(call["input_size"], width)] if call["input_size_per_partition"] < call["input_size"] else []
        if len(parts) > 1 or sum(parts) < whole:
            edges += [(part * (whole // sum(parts)), height) for part in parts]
        loads_alone = len(parts) == 1
    else:
        # Rows of gate_proj and up_proj; columns of down_proj, unless there is one rank.
        intermediate = call["intermediate_size_per_partition"] * getattr(layer, "moe_tp_size", 1)
        edges = [(intermediate, height), (intermediate, width)]
        loads_alone = intermediate % height == 0
    multiple = 0 if any(size % edge for size, edge in edges) else gcd(*(size // edge for size, edge in edges))
    degrees = [str(size) for size in range(1, multiple + 1) if multiple % size == 0] or ["1"] * loads_alone
    return f"Use --tp-size {' or '.join(degrees)}. Or: " if degrees else "No tensor parallel size helps. "
