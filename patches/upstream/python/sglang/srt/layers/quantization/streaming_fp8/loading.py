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

from sglang.srt.distributed import get_tp_group
from sglang.srt.distributed.parallel_state import model_parallel_is_initialized
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8.capture import (
    WriteCapture,
    storage_key,
)
from sglang.srt.layers.quantization.streaming_fp8.errors import StreamFP8Error
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

# MLA computes w_kc and w_vc from this weight before it is quantized. A model that reads another one is loaded again.
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
        self.is_used = False
        self.finished = 0
        # Tensors that a model itself leaves without memory.
        self._left: list[torch.Tensor] = []
        self._sinks: dict[int, ParameterStream] = {}
        self._thread = threading.get_ident()

    def create(self, layer: torch.nn.Module, weights: dict[str, StreamedWeight]) -> None:
        self.is_used = True
        self.created[layer] = {name: (weight, storage_key(weight.parameter)) for name, weight in weights.items()}

    def start(self, model: torch.nn.Module) -> None:
        """The model is built: capture what is loaded into it from now on."""
        names = {module: name for name, module in model.named_modules()}
        keys = {key for weights in self.created.values() for _, key in weights.values()}
        self._left = [tensor for tensor in _meta_tensors_of(model).values() if storage_key(tensor) not in keys]
        kinds = {}
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
                    kinds[stream.kind, getattr(weights[each][0].quantize, "__func__", None)] = stream
        # Compile kernels once, in this thread, before several threads of a model's loader need them.
        for stream in kinds.values():
            stream.warm_up()
        self.created.clear()

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
        for name, stream in streams.items():
            parameter = layer._parameters.get(name)
            if parameter is None or not parameter.is_meta or self._sinks.get(storage_key(parameter)) is not stream:
                raise NotStreamableError(f"{stream.name} is replaced while it is loaded.")
            if stream.settle():
                raise NotStreamableError(f"{stream.name} is not loaded completely.")
        self.finished += 1
        return {name: stream.storage for name, stream in streams.items()}

    def check(self, model: torch.nn.Module) -> None:
        """Loading has ended."""
        own = {storage_key(tensor) for tensor in self._left}
        left = [name for name, tensor in _meta_tensors_of(model).items() if storage_key(tensor) not in own]
        if left:
            raise NotStreamableError(f"Without memory after loading: {', '.join(left[:8])}")

    def close(self) -> None:
        """Parameters refer to this as long as they live, through their loaders."""
        for held in (self.created, self.layers, self._left, self._sinks):
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
    if stream is None or not stream.created:
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

    The ranks of a tensor parallel group load again together.
    """
    if not envs.SGLANG_STREAMFP8.get() or not _is_supported():
        return load(*args)
    stream, model, reason = ModelStream(), None, None
    token = _current.set(stream)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        model = load(*args)
        if stream.is_used:
            stream.check(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Any error may come of a weight without memory. One that does not is raised by the second load, too.
        if not stream.is_used:
            raise
        reason = f"{type(error).__name__}: {error}"
    finally:
        _current.reset(token)
        stream.close()
    if not stream.is_used:
        return model
    if not _any_rank_fails(reason):
        staged = stream.account.peak / (1 << 20)
        logger.info(
            f"Quantized {stream.finished} layers to fp8 while loading, staged {staged:.1f} MiB at most.{_peak()}"
        )
        return model
    why = reason or "Another rank does."
    logger.warning(f"Loading again, to quantize weights to fp8 after all of them are loaded. {why}")
    # Outside of the except block, whose traceback keeps the first model's memory.
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return load(*args)


def _any_rank_fails(reason: Optional[str]) -> bool:
    fails = reason is not None
    if not model_parallel_is_initialized() or get_tp_group().world_size == 1:
        return fails
    found = torch.tensor(int(fails))
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group)
    return bool(found)


def _peak() -> str:
    """Used in tests to verify memory savings."""
    if not torch.cuda.is_available():
        return ""
    peak, final = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return f" GPU memory: peak {peak / (1 << 30):.3f} GiB, final {final / (1 << 30):.3f} GiB."


def _is_supported() -> bool:
    from sglang.srt.platforms import current_platform
    from sglang.srt.utils import get_bool_env_var, is_cuda, is_hip, offloader

    offloads = not isinstance(offloader.get_offloader(), offloader.NoopOffloader)
    packs_experts = get_bool_env_var("SGLANG_INT4_WEIGHT")
    # Other devices change the layout of weights after loading in ways of their own.
    is_known = is_cuda() or is_hip() or current_platform.is_out_of_tree()
    return is_known and not offloads and not packs_experts


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
