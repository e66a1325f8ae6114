# SPDX-License-Identifier: Apache-2.0
"""Trace where each checkpoint tensor ends up, by running SGLang's own model and loader without memory.

The model is built on the meta device, and its ``load_weights`` gets the checkpoint's tensors, which stay in their
mapped files. Writes to parameters that would be quantized are noted; nothing is copied.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_overlay.core.capture import WriteCapture, storage_key
from sglang_overlay.core.placeholders import set_loader, twin
from sglang_overlay.core.regions import Box, Placement
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.errors import ExportError, UnsupportedWriteError
from sglang_overlay.load import eligibility
from sglang_overlay.load.model_load import ModelLoad, under_way
from sglang_overlay.offline.plan.job import Layout
from sglang_overlay.offline.simulation import simulated_rank
from sglang_overlay.schemes.choice import SchemeChoice
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.settings import Settings

aten = torch.ops.aten


@dataclass(frozen=True)
class Destination:
    """Where a matrix of the checkpoint is written.

    Attributes:
        parameter: qualified name.
        shape: of the parameter.
        dtype: of the parameter; values are cast to it before they are quantized.
        box: the part of the parameter that is written.
    """

    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box


@dataclass
class Trace:
    """Where a model puts its checkpoint's tensors.

    Attributes:
        architecture: name of the model's class.
        layers: names of the layers that are quantized.
        regions: for each checkpoint tensor that is written into one of them, where.
    """

    architecture: str
    layers: list[str] = field(default_factory=list)
    regions: dict[str, list[Destination]] = field(default_factory=dict)


def trace(folder: Path, schemes: SchemeChoice, server_args: Mapping[str, Any]) -> Trace:
    """Trace a checkpoint's tensors into the model, as a single rank would load it.

    Args:
        folder: the checkpoint.
        schemes: which layers are quantized.
        server_args: further fields of SGLang's ``ServerArgs``.

    Raises:
        StreamFP8Error: the model cannot be loaded with these schemes, or its loader cannot be traced.
    """
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with simulated_rank(folder, Layout(), 0, server_args) as rank:
        load = _TracedLoad(schemes)
        config = loader._get_quantization_config(rank.model_config, rank.load_config)
        dtype = set_default_torch_dtype(rank.model_config.dtype)
        with contextlib.closing(load), under_way(load), dtype, torch.no_grad():
            with torch.device("meta"):
                model = loader._initialize_model(rank.model_config, rank.load_config, config)
            tensors = loader.DefaultModelLoader(rank.load_config)._get_all_weights(rank.model_config, model)
            with load.provenance:
                model.load_weights(tensors)
    load.trace.architecture = rank.architecture
    return load.trace


class _Provenance(TorchDispatchMode):
    """Remembers which checkpoint tensors a new tensor consists of, if their rows are only concatenated or copied.

    DeepSeek's loader, for example, concatenates two projections before it loads them as one. Belongs to the loading
    thread; other threads only look up.
    """

    def __init__(self, sources: CheckpointSources) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = sources
        self._derived: dict[int, tuple[StorageWeakRef, list[tuple[str, int]]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self._derive(result, [args[0]])
        elif func is aten.cat.default and not (args[1:] and args[1]):
            self._derive(result, args[0])
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def rows_of(self, tensor: torch.Tensor) -> list[tuple[str, int]]:
        """The checkpoint tensors whose rows make up ``tensor``, in order, with their row counts; empty if unknown."""
        name = self._sources.name_of(tensor)
        if name:
            return [(name, len(tensor) if tensor.ndim else 1)]
        reference, rows = self._derived.get(tensor.untyped_storage()._cdata, (None, []))
        return rows if reference is not None and sum(count for _, count in rows) == len(tensor) else []

    def _derive(self, made: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        rows = [self.rows_of(part) for part in parts]
        if all(rows):
            storage = made.untyped_storage()
            # The weak reference also keeps the key from being reused for other memory.
            self._derived[storage._cdata] = (StorageWeakRef(storage), [row for part in rows for row in part])


_COPIES = frozenset({aten.clone.default, aten._to_copy.default})


class _TracedLoad(ModelLoad):
    """Notes writes to the parameters that would be quantized. All parameters are on the meta device."""

    def __init__(self, schemes: SchemeChoice) -> None:
        super().__init__(Settings(schemes=schemes), torch.device("meta"))
        self.trace = Trace("")
        self.provenance = _Provenance(self.sources)
        self._traced: dict[torch.nn.Module, list[str]] = {}

    def create_weights(
        self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype, plan: LayerPlan
    ) -> None:
        create()
        self._traced[layer] = sorted(plan.weights)
        for name in plan.weights:
            weight = layer.get_parameter(name)
            # In the dtype that is loaded, although the layer may have been created for fp8 values.
            layer._parameters[name] = twin(weight, torch.empty(weight.shape, dtype=dtype, device="meta"))

    def adopt(self, model: torch.nn.Module, build: Callable[[], torch.nn.Module]) -> str | None:
        names = {module: name for name, module in model.named_modules()}
        self.schemes.check_used(names.values())
        for layer, weights in self._traced.items():
            if layer in names and eligibility.why_deferred(names[layer]) is None:
                self._follow(layer, names[layer], weights)
        return None

    @property
    def building(self) -> bool:
        return bool(self._traced)

    def _follow(self, layer: torch.nn.Module, name: str, weights: Sequence[str]) -> None:
        self.trace.layers.append(name)
        for weight in weights:
            parameter = layer.get_parameter(weight)
            sink = _Sink(f"{name}.{weight}", parameter, self.provenance, self.trace.regions)
            loader = parameter.weight_loader  # type: ignore[attr-defined]
            set_loader(parameter, _followed(loader, {storage_key(parameter): sink}))


def _followed(loader: Callable[..., Any], sinks: Mapping[int, _Sink]) -> Callable[..., Any]:
    @functools.wraps(loader)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            with WriteCapture(sinks):
                return loader(*args, **kwargs)
        except UnsupportedWriteError as error:
            raise ExportError(
                f"it cannot be told what is loaded into {next(iter(sinks.values())).name}: {error}"
            ) from error

    return load


class _Sink:
    """Notes the writes to one parameter. Thread-safe, since only one thread at a time writes a checkpoint tensor."""

    def __init__(
        self, name: str, parameter: torch.Tensor, provenance: _Provenance, regions: dict[str, list[Destination]]
    ) -> None:
        self.name = name
        self._shape = parameter.shape
        self._dtype = parameter.dtype
        self._provenance = provenance
        self._regions = regions

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if not destination.numel() or not any(source.stride()):
            return  # A fill with one value is padding.
        *outer, (start, stop), columns = Placement(destination, self._shape).box
        parts = self._provenance.rows_of(source)
        if sum(count for _, count in parts) != stop - start:
            raise UnsupportedWriteError(f"{_described(parts, source)} is not written row by row")
        for name, count in parts:
            box = (*outer, (start, start + count), columns)
            region = Destination(self.name, tuple(self._shape), self._dtype, box)
            self._regions.setdefault(name, []).append(region)
            start += count


def _described(parts: Sequence[tuple[str, int]], source: torch.Tensor) -> str:
    made = " and ".join(name for name, _ in parts) or "something computed from checkpoint tensors"
    return f"{made}, of shape {tuple(source.shape)},"
