# SPDX-License-Identifier: Apache-2.0
"""Hooks around the loaders of SGLang's ``model_loader/loader.py`` and their helpers."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.core.messages import sentence
from sglang_overlay.core.shortage import is_shortage
from sglang_overlay.errors import DumpError, SchemeError
from sglang_overlay.hooks import releases, streamed_loaders
from sglang_overlay.hooks.guard import look_at_hooks, mismatch
from sglang_overlay.load import eligibility, metrics, presharded
from sglang_overlay.load.attempts import load_streamed
from sglang_overlay.load.checkpoint_files import local_files
from sglang_overlay.load.model_load import ModelLoad, current, under_way
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.load.refusal import refuse
from sglang_overlay.load.served_weights import ServedWeights
from sglang_overlay.load.summary import role_of, summarize
from sglang_overlay.observe.memory import MemorySampler, MemoryWatch, meter_for
from sglang_overlay.observe.report import LoadReport, ReportError, summary_line, write
from sglang_overlay.schemes import registry
from sglang_overlay.schemes.choice import MXFP8
from sglang_overlay.settings import MODE_VARIABLE, Mode, Settings, load_settings
from sglang_overlay.update import cast_guard
from sglang_overlay.update.model import UpdatableModel, remember

logger = logging.getLogger(__name__)

ONLINE = ("fp8", MXFP8)
"""Values of ``--quantization`` under which a bf16 checkpoint is quantized, and can be streamed."""


def load_without_the_series(load: Callable[..., Any], *args: Any) -> Any:
    """In place of ``load_streaming`` of the patch series: only loads, since the overlay's other hooks stream."""
    return load(*args)


def load_model(original: Callable[..., Any], loader: Any, *, model_config: Any, device_config: Any) -> Any:
    """Around ``load_model`` of ``DefaultModelLoader`` and of the other loaders that fill parameters."""
    settings = _settings(loader.load_config)
    is_draft = role_of(model_config) == "draft"
    is_fp8 = model_config.quantization in ONLINE
    if not is_fp8 and settings.report_folder is None:
        _mention_idle_scheme(settings, is_draft=is_draft)
        return original(loader, model_config=model_config, device_config=device_config)
    registry.check(settings.schemes)
    _refuse_second_scheme(model_config.quantization, settings)
    device = torch.device(device_config.device)
    obstacle = (
        mismatch()
        or eligibility.why_not_platform()
        or eligibility.why_not_options()
        or streamed_loaders.why_not_loader(loader)
        or (None if settings.schemes.is_stock else streamed_loaders.why_not_schemes(loader))
    )
    is_part = is_draft or parallel_ranks().pp.size > 1
    began = time.perf_counter()
    meter = meter_for(device)
    # Only the report needs a curve; everything else needs just the peak.
    is_sampled = settings.report_folder is not None or not meter.keeps_peak
    with MemorySampler(meter) if is_sampled else MemoryWatch(meter) as watch:
        load, model = load_streamed(
            lambda: original(loader, model_config=model_config, device_config=device_config),
            partial(ModelLoad, settings, device, is_part=is_part, is_fp8=is_fp8),
            obstacle,
            model_config,
        )
    ended = time.perf_counter()
    if load.schemes.is_idle:
        _mention_idle_scheme(settings, is_draft=is_draft)
    _remember(load, model, loader, model_config)
    times = began, ended
    report = summarize(load, model, releases.installed(), model_config, loader.load_config, times, watch.usage)
    metrics.tell(report)
    if load.record.layers or settings.report_folder is not None:
        logger.info("%s", summary_line(report))
    if settings.report_folder is not None:
        _write_report(report, settings.report_folder)
    return model


def _refuse_second_scheme(quantization: str | None, settings: Settings) -> None:
    if quantization == MXFP8 and not settings.schemes.is_stock:
        raise SchemeError(
            f"{settings.required_by} chooses a scheme of --quantization fp8, and --quantization {MXFP8} is one "
            "itself. Choose no scheme, or use --quantization fp8."
        )


def _settings(load_config: Any) -> Settings:
    return load_settings(os.environ, load_config.model_loader_extra_config)


def _mention_idle_scheme(settings: Settings, *, is_draft: bool) -> None:
    """Warn that a chosen scheme has no effect. Not for drafts, which may be in bf16 or quantized already."""
    if not settings.schemes.is_stock and not is_draft:
        logger.warning(
            "StreamFP8: %s chooses nothing here: no layer is quantized while it is loaded. It belongs with "
            "--quantization fp8 and a bf16 checkpoint.",
            settings.required_by,
        )


def _remember(load: ModelLoad, model: torch.nn.Module, loader: Any, model_config: Any) -> None:
    """Keep what later weight updates of the model need, and tell what is served."""
    if streamed_loaders.updates_itself(loader):
        cast_guard.note_quantizing(model)
        return
    if model_config.quantization in ONLINE:
        metrics.serve(model, ServedWeights(model, role_of(model_config)))
    for layer in load.updatable.values():
        layer.conclude()
    stock = load.fallback.reasons
    if load.abandoned and load.settings.mode is not Mode.OFF:
        stock = {"this model": load.abandoned}
    if load.updatable or stock:
        remember(model, UpdatableModel(load.updatable.values(), stock, load.checkpoint.wanted, model_config))


def initialize_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``_initialize_model``: build the model with placeholders, or again without where it cannot take them."""
    call, load = inspect.signature(original).bind(*args, **kwargs).arguments, current()
    if load is None:
        _refuse_other_loader(call)
    elif ModelLoad.covers(call.get("quant_config")):
        load.is_covered = True
        look_at_hooks(load.settings)
    if load is None or load.abandoned:
        return original(*args, **kwargs)
    try:
        with load.building_model():
            model = original(*args, **kwargs)
        reason = load.adopt(model, lambda: original(*args, **kwargs))
    except Exception as error:
        if not load.building or is_shortage(error) or isinstance(error, load.final):
            raise  # Without placeholders it would need more memory still, or not be what was asked for.
        reason = f"building it with placeholders fails ({type(error).__name__}: {error})"
    if reason is None:
        return model
    model = None
    load.abandon(reason)
    load.refuse(f"{_architecture(call)} cannot be streamed: {reason}")
    return original(*args, **kwargs)


def init_parameters(original: Callable[..., None], model: Any, module: torch.nn.Module) -> None:
    """Around ``TransformersBase._init_parameters``: it gives memory to each parameter of a module that has none."""
    load = current()
    with nullcontext() if load is None else load.set_aside(module):
        original(model, module)


def _architecture(call: Mapping[str, Any]) -> str:
    return ", ".join(getattr(call["model_config"].hf_config, "architectures", None) or ["this model"])


def get_all_weights(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Around ``DefaultModelLoader._get_all_weights``."""
    load = current()
    if load is None:
        yield from original(*args, **kwargs)
        return
    model_config = inspect.signature(original).bind(*args, **kwargs).arguments["model_config"]
    # Not to what the model raises: that ends this generator with GeneratorExit.
    with load.checkpoint.files.problems_added(model_config.model_path):
        for name, tensor in original(*args, **kwargs):
            load.see(name, tensor)
            yield name, tensor


def load_quantized(original: Callable[..., Any], loader: Any, *, model_config: Any, device_config: Any) -> Any:
    """Around ``load_model`` of loaders that fill parameters after ``process_weights_after_loading``.

    ``ShardedStateLoader`` reads them from its files. Before 0.5.14, ``DummyModelLoader`` makes them up; later releases
    fill every weight before, see ``initialize_dummy_weights``.
    """

    def load(loader: Any, *, model_config: Any, device_config: Any) -> Any:
        under_way_load = current()
        if under_way_load is not None:
            under_way_load.expect_quantized()
        return original(loader, model_config=model_config, device_config=device_config)

    return load_model(load, loader, model_config=model_config, device_config=device_config)


def save_sharded_state(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Around ``ShardedStateLoader.save_model``: safetensors refuses fp8 weights, which are transposed views."""
    state = {name: _packed(tensor) for name, tensor in model.state_dict().items()}
    return original(_State(state), *args, **kwargs)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    # Copied to host memory: a second copy of the weights may not fit on the device.
    return tensor if tensor.is_contiguous() else tensor.cpu().contiguous()


def load_from_presharded(original: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``PreshardedModelLoader._load_from_presharded``: as for sharded state, if the dump is what is asked for.

    Raises:
        DumpError: it was made of something else.
    """
    load, call = current(), inspect.signature(original).bind(loader, *args, **kwargs).arguments
    if load is None:
        return original(loader, *args, **kwargs)
    load.expect_quantized()
    folder = Path(call["presharded_dir"])
    presharded.check(folder, _made_of(load.settings), local_files(call["model_config"], loader.load_config))
    model = original(loader, *args, **kwargs)
    presharded.restore_orders(folder, parallel_ranks().name, model)
    return model


def load_and_dump(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``PreshardedModelLoader._first_time_load_and_dump``: say why no dump that is there already is read.

    Raises:
        DumpError: there are some, and streaming is required.
    """
    load, call = current(), inspect.signature(original).bind(*args, **kwargs).arguments
    model_config, folder = call["model_config"], Path(call["presharded_dir"])
    if load is not None and model_config.quantization in ONLINE:
        made = {**call["shard_config"], **_made_of(load.settings)}
        _say_why_not(presharded.others(folder, model_config, made), folder.parent, load.settings)

        def keep_record() -> None:
            if load.is_covered and parallel_ranks().is_first:
                presharded.write(folder, model_config, made, load.checkpoint.files.read)

        # Before the dump, which SGLang marks as complete.
        load.at_end(keep_record)
    return original(*args, **kwargs)


def _say_why_not(others: Sequence[str], folder: Path, settings: Settings) -> None:
    if not others:
        return
    text = f"no dump in {folder} fits this start: {'; '.join(others)}"
    if settings.mode is Mode.REQUIRE:
        raise DumpError(
            f"{MODE_VARIABLE}={Mode.REQUIRE.value}, but {text}. Remove what is not needed, or give another "
            '"presharded_path" in --model-loader-extra-config.'
        )
    if parallel_ranks().is_first:
        logger.warning("StreamFP8: %s. The checkpoint is read, and another dump written.", text)


def dump_state(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Around ``PreshardedModelLoader._dump_state_to_disk``: not before the load is known to have gone well."""
    load, call = current(), inspect.signature(original).bind(*args, **kwargs).arguments
    if load is None:
        return original(*args, **kwargs)

    def dump() -> None:
        if load.is_covered:
            presharded.keep_orders(Path(call["presharded_dir"]), parallel_ranks().name, call["extras"])
        original(*args, **kwargs)

    return load.at_end(dump)


def describe_without_loading(original: Callable[..., Any], loader: Any, model_config: Any) -> Any:
    """Around ``PreshardedModelLoader._compute_local_structural_signature``: the model it builds is never loaded.

    The signature distinguishes dumps, so it has to cover what SGLang does not think of.
    """
    load = ModelLoad(Settings(Mode.OFF), torch.device("meta"))
    with under_way(load):
        found = original(loader, model_config)
    return presharded.signature(found, _made_of(_settings(loader.load_config))) if load.is_covered else found


def _made_of(settings: Settings) -> presharded.Made:
    return presharded.made_of(settings, releases.installed())


def initialize_dummy_weights(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Around ``initialize_dummy_weights``: give each placeholder the values that stock would fill its weight with.

    Scales that quantizing them has written stay. If layers have been processed already, there are no placeholders left.
    """
    load = current()
    if load is None:
        return original(model, *args, **kwargs)
    for name, placeholder, stream in load.placeholders():
        weight = torch.empty_like(placeholder, device=stream.storage.weight.device)
        original(_State({name: weight}), *args, **kwargs)
        stream.write(placeholder, weight)
    filled = load.filled
    real = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta and name not in filled}
    return original(_State(real), *args, **kwargs)


class _State:
    """The part of a model's interface that upstream needs to fill or save one."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._tensors


def _write_report(report: LoadReport, folder: Path) -> None:
    try:
        write(report, folder)
    except ReportError as error:
        # The model is loaded correctly; a missing report must not stop the server.
        logger.warning("StreamFP8: %s", sentence(error))


def _refuse_other_loader(call: Mapping[str, Any]) -> None:
    """Refuse an fp8 load that did not come through ``load_model``: its loader fills parameters in another way."""
    settings = _settings(call["load_config"])
    if settings.mode is not Mode.OFF and ModelLoad.covers(call.get("quant_config")):
        load_format = getattr(call["load_config"].load_format, "value", call["load_config"].load_format)
        refuse(settings.required_by, f"load format {load_format} is not streamed")
