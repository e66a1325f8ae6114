"""Stream the weights of a model while ``DefaultModelLoader`` loads it."""

from __future__ import annotations

import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Optional

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8.capture import (
    WriteCapture,
    storage_key,
)
from sglang.srt.layers.quantization.streaming_fp8.errors import (
    LayerNotStreamableError,
    StreamFP8Error,
    UnsupportedWriteError,
)
from sglang.srt.layers.quantization.streaming_fp8.placeholders import (
    materialize,
    set_loader,
)
from sglang.srt.layers.quantization.streaming_fp8.staging import StagingAccount
from sglang.srt.layers.quantization.streaming_fp8.stream import ParameterStream, Storage
from sglang.srt.layers.quantization.streaming_fp8.units import UnitGrid
from sglang.srt.layers.quantization.streaming_fp8.whole_unit import (
    QuantizeFunc,
    WholeUnitQuantizer,
)

logger = logging.getLogger(__name__)

# MLA computes w_kc and w_vc from this weight before it is quantized.
READ_AFTER_LOADING = ("kv_b_proj",)


class NotStreamableError(StreamFP8Error):
    """The model has to be loaded without streaming."""


@dataclass(frozen=True)
class StreamedWeight:
    """A parameter on the meta device, and how its units are quantized: each expert, or all of it."""

    parameter: torch.nn.Parameter
    quantize: QuantizeFunc
    # float32, one index of the first dimension a unit.
    scale: torch.Tensor
    per_expert: bool

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def stream(self, name: str, account: StagingAccount) -> ParameterStream:
        from sglang.srt.layers.quantization.fp8 import fp8_dtype

        shape = tuple(self.parameter.shape)
        grid = UnitGrid.per_slice(shape) if self.per_expert else UnitGrid.one(shape)
        values = torch.empty((grid.count, *grid.shape), dtype=fp8_dtype, device=self.device)
        storage, quantizer = Storage(values, self.scale), WholeUnitQuantizer(self.quantize)
        return ParameterStream(name, self.parameter, grid, quantizer, storage, account)


class ModelStream:
    """One load of a model, in the thread that made this; a model's loader threads only write to its streams."""

    def __init__(self) -> None:
        self.account = StagingAccount()
        self.layers: dict[torch.nn.Module, dict[str, ParameterStream]] = {}
        # With the placeholders' storages, which tell whether a model replaces its weights while it is built.
        self.created: dict[torch.nn.Module, dict[str, tuple[StreamedWeight, int]]] = {}
        self.is_started = False
        self.finished = 0
        self._sinks: dict[int, ParameterStream] = {}
        self._thread = threading.get_ident()

    def create(self, layer: torch.nn.Module, weights: dict[str, StreamedWeight]) -> None:
        self.created[layer] = {name: (weight, storage_key(weight.parameter)) for name, weight in weights.items()}

    def start(self, model: torch.nn.Module) -> None:
        """The model is built: capture what is loaded into it from now on."""
        names = {module: name for name, module in model.named_modules()}
        keys = {key for weights in self.created.values() for _, key in weights.values()}
        if any(storage_key(tensor) not in keys for tensor in _meta_tensors_of(model).values()):
            raise NotStreamableError("The model has tensors without memory of its own.")
        for layer, weights in self.created.items():
            for each, (weight, key) in weights.items():
                if layer._parameters.get(each) is not weight.parameter or storage_key(weight.parameter) != key:
                    raise NotStreamableError(f"{names.get(layer)}.{each} is repacked while the model is built.")
            name = names.get(layer)
            if name is None or name.rsplit(".", 1)[-1] in READ_AFTER_LOADING:
                for weight, _ in weights.values():
                    materialize(weight.parameter, torch.empty_like(weight.parameter, device=weight.device))
            else:
                streams = {each: weight.stream(f"{name}.{each}", self.account) for each, (weight, _) in weights.items()}
                self.layers[layer] = streams
                for each, stream in streams.items():
                    self._capture(weights[each][0].parameter, stream)
        # Compile kernels once, in this thread, before several threads of a model's loader need them.
        for stream in {stream.kind: stream for stream in self._sinks.values()}.values():
            stream.warm_up()
        self.created.clear()
        self.is_started = True

    def _capture(self, parameter: torch.nn.Parameter, stream: ParameterStream) -> None:
        self._sinks[storage_key(parameter)] = stream
        if loader := getattr(parameter, "weight_loader", None):
            set_loader(parameter, self._captured(loader))

    def _captured(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """``loader``, captured also in threads other than the one in which ``writes`` is active."""

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                return loader(*args, **kwargs)
            with self.writes():
                return loader(*args, **kwargs)

        return load

    def writes(self) -> WriteCapture:
        return WriteCapture(self._sinks)

    def finish(self, layer: torch.nn.Module) -> Optional[dict[str, Storage]]:
        """The fp8 values and scales of a layer that was streamed, by parameter name; None for others."""
        streams = self.layers.pop(layer, None)
        if streams is None:
            return None
        for stream in streams.values():
            missing = stream.settle(zeros=True)
            if missing:
                logger.warning(f"{stream.name}: {len(missing)} of {stream.units} units are not loaded, and zero")
        self.finished += 1
        return {name: stream.storage for name, stream in streams.items()}

    def check(self, model: torch.nn.Module) -> None:
        """Loading has ended."""
        left = list(_meta_tensors_of(model))
        if self.finished and left:
            raise NotStreamableError(f"Computed from weights before they are quantized: {', '.join(left[:8])}")

    def close(self) -> None:
        """Parameters refer to this as long as they live, through their loaders."""
        for held in (self.created, self.layers, self._sinks):
            held.clear()


_current: ContextVar[Optional[ModelStream]] = ContextVar("streaming_fp8", default=None)


def is_streamed(method: Any, layer: torch.nn.Module) -> bool:
    """Whether ``method`` is to create the weights of ``layer`` on the meta device, for ``stream_weights``."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    config = method.quant_config
    return (
        _current.get() is not None
        and type(config) is Fp8Config
        and not config.is_checkpoint_fp8_serialized
        and not getattr(config, "is_fp4_experts", False)
        and config.weight_block_size is None
        # A method that wraps this one manages the layer's memory itself (kt-ep).
        and getattr(layer, "quant_method", None) is method
    )


def stream_weights(layer: torch.nn.Module, **weights: StreamedWeight) -> None:
    """Quantize ``weights``, parameters of ``layer``, while they are loaded."""
    _current.get().create(layer, weights)


@contextmanager
def streaming(model: torch.nn.Module) -> Iterator[None]:
    """Context for loading the weights of ``model``, which has just been built."""
    stream = _current.get()
    if stream is None:
        yield
        return
    stream.start(model)
    with stream.writes():
        yield


def finish_streaming(layer: torch.nn.Module) -> Optional[dict[str, Storage]]:
    """The fp8 values and scales of ``layer``, by parameter name, if they were made while it was loaded."""
    stream = _current.get()
    return None if stream is None else stream.finish(layer)


def load_streaming(load: Callable[..., torch.nn.Module], *args: Any) -> torch.nn.Module:
    """Load a model, streamed where it can be; again without where that turns out to be impossible.

    Each rank decides for itself. Ranks wait for each other only when they have loaded.
    """
    if not envs.SGLANG_STREAMFP8.get() or not _is_supported():
        return load(*args)
    stream, model = ModelStream(), None
    token = _current.set(stream)
    try:
        model = load(*args)
        stream.check(model)
        if stream.finished:
            staged = stream.account.peak / (1 << 20)
            logger.info(f"Quantized {stream.finished} layers to fp8 while loading, staged {staged:.1f} MiB at most.")
        return model
    except (NotStreamableError, LayerNotStreamableError, UnsupportedWriteError) as error:
        reason = str(error)
    except Exception as error:
        # A model that is being built may not get along with weights without memory.
        if stream.is_started or not stream.created or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"{type(error).__name__}: {error}"
    finally:
        _current.reset(token)
        stream.close()
    logger.warning(f"Loading again, to quantize weights to fp8 after all of them are loaded. {reason}")
    # Outside of the except block, whose traceback keeps the first model's memory.
    del model
    gc.collect()
    return load(*args)


def _is_supported() -> bool:
    from sglang.srt.utils import get_bool_env_var, is_cpu, is_npu, is_xpu, offloader

    offloads = not isinstance(offloader.get_offloader(), offloader.NoopOffloader)
    packs_experts = get_bool_env_var("SGLANG_INT4_WEIGHT")
    return not (is_cpu() or is_npu() or is_xpu() or offloads or packs_experts)


def _meta_tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and attributes (MLA's w_kc, lists of experts' weights) of a model that have no memory."""
    found = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                found[name] = value
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                look(f"{name}[{key}]", item)

    for prefix, module in model.named_modules():
        own = {
            name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")
        }
        for name, value in {**module._parameters, **module._buffers, **own}.items():
            look(f"{prefix}.{name}", value)
    return found
