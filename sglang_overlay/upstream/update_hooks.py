# SPDX-License-Identifier: Apache-2.0
"""Where SGLang updates weights: the model runner or its ``WeightUpdater``, the scheduler's sessions, and the loader.

Upstream reports a failed update in three ways: some methods return ``(False, message)``, others raise, which ends the
server, and the end of a session cannot fail at all. Here every update of streamed weights that fails is answered with
``success=False`` and a message that says which layers hold new values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from sglang_overlay.core.pipeline import workers_for
from sglang_overlay.errors import PartialUpdateError, WeightUpdateError
from sglang_overlay.upstream import load
from sglang_overlay.upstream.checkpoint_files import CheckpointFiles, noted_problems
from sglang_overlay.upstream.update import ALL_OLD, UpdatableModel, WeightUpdate, updatable
from sglang_overlay.upstream.updaters import has_sessions, model_of

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Answer = tuple[bool, str]

_VALUES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
"""Dtypes of quantized weights; the fp8 dtype without a mantissa is one of scales."""

_NO_SESSIONS = "This release of SGLang has no update sessions: each call is an update of its own."


def load_weights_and_postprocess(
    original: Callable[..., None], model: torch.nn.Module, weights: NamedTensors, target_device: torch.device
) -> None:
    """Around ``DefaultModelLoader.load_weights_and_postprocess``, which updates from disk call again.

    Raises:
        WeightUpdateError: reading or quantizing failed, or some units came only in part.
    """
    known = updatable(model)
    if known is None or load.current() is not None:
        return original(model, weights, target_device)
    try:
        with _one_update(known, workers_for(target_device)) as update, update.loading(model):
            original(model, _offered(update, weights), target_device)
    except WeightUpdateError as error:
        _on_failure.get()()
        # Upstream ends the sentence.
        raise type(error)(str(error).rstrip(".")) from error.__cause__
    return None


def update_weights_from_disk(
    original: Callable[..., Answer], updater: Any, model_path: str, *args: Any, **kwargs: Any
) -> Answer:
    """Around ``WeightUpdater.update_weights_from_disk``.

    Upstream answers a failure by reading "the original weights" again, but from the path that has just failed, and
    when that fails too the exception ends the server. Here the path is put back first, and after any other failure:
    one that comes before the weights are read leaves the new path behind.
    """
    if updatable(model_of(updater)) is None:
        return original(updater, model_path, *args, **kwargs)
    served = updater.model_config.model_path
    put_back = functools.partial(setattr, updater.model_config, "model_path", served)
    # Between a failure and reading again, so that what is read again are the weights that were served before.
    token = _on_failure.set(put_back)
    success, message = False, ""
    try:
        with CheckpointFiles().noted():
            success, message = original(updater, model_path, *args, **kwargs)
    except Exception as error:
        logger.exception("StreamFP8: the weights could not be updated from %s.", model_path)
        message = f"Failed to update weights, and to go back to those of {served}: {error}"
    finally:
        _on_failure.reset(token)
        if not success:
            put_back()
    return success, message


def begin_weight_update(original: Callable[..., None], updater: Any) -> None:
    """Around ``WeightUpdater.begin_weight_update``, which cannot fail: that is left to the session's end.

    Until then each call is an update of its own.
    """
    original(updater)
    known = updatable(model_of(updater))
    if known is None:
        return
    known.unopened = None
    try:
        known.begin()
    except Exception as error:
        logger.exception("StreamFP8: a weight update could not be opened.")
        # Told already, and it would keep alive what the update had opened.
        known.unopened = error.with_traceback(None)


def end_weight_update(original: Callable[..., None], updater: Any, *, run_post_load: bool) -> None:
    """Around ``WeightUpdater.end_weight_update``.

    Raises:
        WeightUpdateError: upstream's part failed, the update could not be opened, or some units came only in part; left
            to ``end_session`` where that is waiting for it.
    """
    model = model_of(updater)
    known = updatable(model)
    if known is None:
        return original(updater, run_post_load=run_post_load)
    try:
        with _one_update(known) as update:
            with update.loading(model):
                original(updater, run_post_load=run_post_load)
            known.end()
            if known.unopened is not None:
                raise known.unopened
    except WeightUpdateError as error:
        known.abort()
        failures = _failures.get()
        if failures is None:
            raise
        failures.append(str(error))
    return None


def end_session(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around ``SchedulerWeightUpdaterManager.end_weight_update``: let the end of a session fail, on all ranks."""
    if all(updatable(runner.model) is None for _, runner in manager._select_runners()):
        return original(manager, request)
    failures: list[str] = []
    token = _failures.set(failures)
    try:
        answer = original(manager, request)
    finally:
        _failures.reset(token)
    failures = _of_all_ranks(failures, manager.tp_cpu_group)
    return type(answer)(success=False, message=" ".join(dict.fromkeys(failures))) if failures else answer


def load_weights_from_distributed(original: Callable[..., Answer], updater: Any, named_tensors: NamedTensors) -> Answer:
    """Around ``WeightUpdater.load_weights_from_distributed``."""
    return _answered(updater, lambda: original(updater, named_tensors))


def update_weights_from_distributed(original: Callable[..., Answer], updater: Any, *args: Any, **kwargs: Any) -> Answer:
    """Around ``update_weights_from_distributed``, which receives and loads the tensors of one call.

    Later releases have ``load_weights_from_distributed`` for the second half.
    """
    return _answered(updater, lambda: original(updater, *args, **kwargs))


def update_weights_from_tensor(
    original: Callable[..., Answer], updater: Any, named_tensors: Any, load_format: str | None = None
) -> Answer:
    """Around ``WeightUpdater.update_weights_from_tensor``."""
    return _answered(updater, lambda: original(updater, named_tensors, load_format), load_format)


def update_weights_from_ipc(original: Callable[..., Answer], updater: Any, request: Any) -> Answer:
    """Around ``WeightUpdater.update_weights_from_ipc``, which post-processes what it has loaded."""
    return _answered(updater, lambda: original(updater, request))


def load_weights_direct(original: Callable[..., None], model: torch.nn.Module, named_tensors: NamedTensors) -> None:
    """Around ``_model_load_weights_direct``, whose names are those of parameters.

    Values that are fp8 already, and scales, go to the parameters that are served, as in stock.

    Raises:
        WeightUpdateError: a layer cannot be updated with high-precision values.
    """
    known = updatable(model)
    if known is None or known.open is None:
        return original(model, named_tensors)
    tensors = list(named_tensors)
    mine = [(name, tensor) for name, tensor in tensors if known.open.takes(name) and tensor.dtype.itemsize > 1]
    names = {name for name, _ in mine}
    others = [(name, tensor) for name, tensor in tensors if name not in names]
    _refuse_cast(model, others)
    original(model, others)
    with known.open.loading(model):
        original(model, mine)
    return None


_on_failure: ContextVar[Callable[[], None]] = ContextVar("streamfp8_on_failure", default=lambda: None)
_failures: ContextVar[list[str] | None] = ContextVar("streamfp8_failures", default=None)


@contextmanager
def _one_update(known: UpdatableModel, workers: int = 0) -> Iterator[WeightUpdate]:
    """The update that is open, or else one for this call alone.

    Raises:
        WeightUpdateError: whatever went wrong, with what the layers hold now.
    """
    update = known.open
    is_open = update is not None
    try:
        update = update or known.begin(workers)
        yield update
        if not is_open:
            known.end()
    except Exception as error:
        failure = _failure(error, ALL_OLD if update is None else update.progress)
        if not is_open:
            known.abort()
        raise failure from error


def _failure(error: Exception, progress: str) -> WeightUpdateError:
    """``error`` as one of a weight update: all it says, and what the layers hold now."""
    kind, told = WeightUpdateError, f"{type(error).__name__}: {error}"
    if isinstance(error, WeightUpdateError):
        kind, told = type(error), str(error)
    notes = (*getattr(error, "__notes__", ()), *noted_problems())
    return kind("\n".join((f"{told.rstrip('.')}. {progress}", *notes)))


def _refuse_cast(model: torch.nn.Module, tensors: NamedTensors) -> None:
    """Stock's loader would cast such values to fp8 without a word, and leave the scale as it is.

    Raises:
        WeightUpdateError: a tensor in high precision is meant for fp8 values.
    """
    served = {name: weight for name, weight in model.named_parameters() if weight.dtype in _VALUES}
    for name, tensor in tensors:
        if name in served and tensor.dtype.itemsize > 1:
            raise WeightUpdateError(
                f"{name} was quantized by stock SGLang, which cannot quantize it again: these {tensor.dtype} values "
                "would be cast under the old scale. Send fp8 values with their scale"
            )


def _answered(updater: Any, call: Callable[[], Answer], load_format: str | None = None) -> Answer:
    """Upstream's answer to ``call``, made as a part of the open update; a failure is an answer too."""
    model = model_of(updater)
    known = updatable(model)
    if known is None:
        return call()
    try:
        with _one_update(known) as update:
            # A direct load has names of served parameters among its own: load_weights_direct tells them apart.
            with nullcontext() if load_format == "direct" else update.loading(model):
                success, message = call()
            if not success:
                raise WeightUpdateError(message)
    except WeightUpdateError as error:
        told, is_partial = str(error), isinstance(error, PartialUpdateError)
        if is_partial and not has_sessions(updater):
            told = f"{told} {_NO_SESSIONS}"
        logger.error("StreamFP8: a weight update failed: %s", told, exc_info=None if is_partial else error.__cause__)
        return False, told
    return success, message


def _offered(update: WeightUpdate, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``, with it noted which come from a checkpoint and so stay as they are."""
    from sglang.srt.model_loader.weight_utils import RUNAI_STREAMER_TENSOR_ATTR

    for name, tensor in weights:
        # The Run:ai streamer writes the next tensor into the same memory.
        if not getattr(tensor, RUNAI_STREAMER_TENSOR_ATTR, False):
            update.sources.offer(tensor)
        yield name, tensor


def _of_all_ranks(failures: list[str], group: Any) -> list[str]:
    ranks = torch.distributed.get_world_size(group=group)
    if ranks == 1:
        return failures
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, failures, group=group)
    return [failure for found in gathered for failure in found]
