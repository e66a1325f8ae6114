# SPDX-License-Identifier: Apache-2.0
"""Hooks where SGLang updates weights: the model runner or its ``WeightUpdater``, the scheduler's sessions, the loader.

Upstream handles a failed update in three ways: some methods return ``(False, message)``, others raise, which ends the
server, and the end of a session cannot fail at all. Each rank answers for itself, and only the first one's answer is
used. Here all tensor parallel ranks compare the outcome of each call to update streamed weights. If one has failed, all
restore what they held before, and answer ``success=False`` with a message.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_overlay.core.messages import shortened
from sglang_overlay.core.tensor_names import Misplaced
from sglang_overlay.errors import PartialUpdateError, WeightUpdateError
from sglang_overlay.load import metrics, model_load
from sglang_overlay.load.checkpoint_files import CheckpointFiles, noted_problems
from sglang_overlay.load.ranks import gathered, parallel_ranks
from sglang_overlay.observe.weights_report import SESSION, UpdateReport
from sglang_overlay.update.cast_guard import casts_refused, refuse_casts
from sglang_overlay.update.model import UpdatableModel, any_in_session, updatable
from sglang_overlay.update.updaters import has_sessions, model_of
from sglang_overlay.update.weight_update import WeightUpdate

logger = logging.getLogger(__name__)

_KINDS = {"flattened_bucket": "buckets", "direct": "direct", "_model_load_weights_direct": "direct"}
"""Kinds of tensors that are sent, by their load format: upstream's own, or its function as a custom weight loader."""

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Answer = tuple[bool, str]

BEFORE_UPDATE = "All weights are those of before this update."
"""How an answer describes the weights when an update has failed."""
BEFORE_CALL = "All weights are those of before this call. The update goes on: send again what this call was to bring."
"""The same for one call of several."""
_NOT_FLUSHED = (
    "Requests are running, so the cache still holds what was computed since the last call of this update: abort or "
    "retract them, then call /flush_cache."
)
_ANOTHER_FAILED = f"Another model of the same request could not be updated. {BEFORE_UPDATE}"


@dataclass
class DiskUpdate:
    """A running update from disk.

    Attributes:
        model_config: upstream's; it names the folder.
        is_whole: whether the folder is read in full, as a checkpoint that replaces all weights.
        is_judged: whether the ranks have compared their outcomes.
        failure: what went wrong, once all ranks know.
        note: what else the answer should say.
    """

    model_config: Any
    is_whole: bool
    is_judged: bool = False
    failure: str | None = None
    note: str = ""


class Together:
    """Updates of a target and its drafts by one request: all of them are kept, or none.

    Attributes:
        failed: whether one of the models could not be updated.
    """

    def __init__(self) -> None:
        self.failed = False
        self._told: Outcome | None = None
        self._undo: list[Callable[[], None]] = []
        self._keep: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None], keep: Callable[[], None] = lambda: None) -> None:
        """Add a successful part: ``undo`` is called at the end if another fails, else ``keep``."""
        self._undo.append(undo)
        self._keep.append(keep)

    def joined(self, outcome: Outcome) -> Outcome:
        """A model's outcome merged with those before: upstream's answer is the last model's, and must cover all."""
        self.failed |= outcome.failure is not None
        earlier, self._told = self._told, outcome
        if earlier is not None:
            self._told = replace(
                outcome,
                unused=[name for name in outcome.unused if name in earlier.unused],
                untouched=[*earlier.untouched, *outcome.untouched],
                advice=earlier.advice or outcome.advice,
                waiting=(*earlier.waiting, *outcome.waiting),
            )
        return self._told

    def end(self) -> None:
        """Undo everything if a model could not be updated on any rank; else keep everything."""
        if self._undo:
            # Models that are not streamed only know of their own rank.
            self.failed = _of_all(Outcome("" if self.failed else None)).failure is not None
        # Undone in reverse: a draft model may share memory with its target, which was updated first.
        for step in reversed(self._undo) if self.failed else self._keep:
            step()


@dataclass(frozen=True)
class Outcome:
    """The outcome of one call on one rank; all ranks of a tensor parallel group exchange theirs.

    Attributes:
        failure: what went wrong; None after a success.
        is_partial: whether the failure is incomplete units.
        is_late: whether the end of a session has replaced weights that its calls had brought.
        unused: names of tensors that were not used.
        untouched: parameters that a complete checkpoint would have replaced.
        advice: what to do about ``untouched``.
        waiting: weights that keep their values until later calls bring the rest, without a session.
    """

    failure: str | None = None
    is_partial: bool = False
    is_late: bool = False
    unused: Sequence[str] = ()
    untouched: Sequence[str] = ()
    advice: str = ""
    waiting: Sequence[str] = ()


def load_weights_and_postprocess(
    original: Callable[..., None], model: torch.nn.Module, weights: NamedTensors, target_device: torch.device
) -> None:
    """Around ``DefaultModelLoader.load_weights_and_postprocess``, which updates from disk call again.

    After a failure, upstream calls it once more to read "the original weights". That call does nothing: the original
    weights have been restored, and may not have come from the folder that it would read.

    Raises:
        WeightUpdateError: reading or quantizing failed on some rank.
    """
    known, load = updatable(model), model_load.current()
    if load is not None:
        return original(model, _seen(load, weights), target_device)
    if known is None:
        return original(model, weights, target_device)
    disk = _disk.get()
    if disk is not None and disk.failure is not None:
        return None

    def read(update: WeightUpdate) -> None:
        with update.loading(model):
            original(model, _offered(update, weights), target_device)

    _, outcome = _judged(known, model, read, "disk", disk=disk)
    if outcome.failure is None:
        return None
    raise _error(outcome)


def update_weights_from_disk(
    original: Callable[..., Answer], updater: Any, model_path: str, *args: Any, **kwargs: Any
) -> Answer:
    """Around ``WeightUpdater.update_weights_from_disk``.

    If the update fails, the model's path is restored. A rank that fails before it reads any weights tells the others,
    which wait for its outcome.
    """
    known = updatable(model_of(updater))
    if known is None:
        return _noted(updater, "disk", lambda: original(updater, model_path, *args, **kwargs))
    known.stop_waiting(model_of(updater))
    call = inspect.signature(original).bind(updater, model_path, *args, **kwargs).arguments
    served = updater.model_config.model_path
    disk = DiskUpdate(updater.model_config, is_whole=call.get("weight_name_filter") is None)
    token = _disk.set(disk)
    success, message = False, ""
    try:
        with CheckpointFiles().noted():
            success, message = original(updater, model_path, *args, **kwargs)
    except Exception as error:
        logger.exception("StreamFP8: the weights could not be updated from %s.", model_path)
        message = _told(error)
        if disk.is_judged and disk.failure is None:
            message = f"The new weights are served, but what follows failed: {_told(error)}"
    finally:
        _disk.reset(token)
    if not disk.is_judged:
        outcome = _of_all(Outcome(None if success else f"{_sentence(message)} {BEFORE_UPDATE}"))
        disk.failure = outcome.failure
        if disk.failure is not None:
            _tell_failure(model_of(updater), "disk", disk.failure)
        _joined_with_earlier(outcome)
    if disk.failure is not None:
        message = f"Failed to update weights: {disk.failure}"
    if disk.failure is not None or not success:
        updater.model_config.model_path = served
        return False, message
    together = _together.get()
    if together is not None:
        together.add(functools.partial(setattr, updater.model_config, "model_path", served))
    return True, _joined(message, disk.note)


def update_of_all_models(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around ``SchedulerWeightUpdaterManager.update_weights_from_disk`` and similar: target first, then drafts.

    Upstream stops at the first model that fails. Then the models before it are undone as well.
    """
    together = Together()
    token = _together.set(together)
    try:
        return original(manager, request)
    except BaseException:
        together.failed = True
        raise
    finally:
        _together.reset(token)
        together.end()


def begin_weight_update(original: Callable[..., None], updater: Any) -> None:
    """Around ``WeightUpdater.begin_weight_update``, which cannot fail: the session's calls and end raise its error."""
    original(updater)
    known = updatable(model_of(updater))
    if known is None:
        return
    known.unopened = None
    try:
        known.begin().is_session = True
    except Exception as error:
        logger.exception("StreamFP8: a weight update could not be opened.")
        # Without the traceback, which is logged already and would keep the failed update's memory alive.
        known.unopened = error.with_traceback(None)


def end_weight_update(original: Callable[..., None], updater: Any, *, run_post_load: bool) -> None:
    """Around ``WeightUpdater.end_weight_update``.

    Raises:
        WeightUpdateError: upstream's part failed, the update could not be opened, or some units were sent only in part.
            Inside ``end_session``, that reports the error instead.
    """
    model = model_of(updater)
    known = updatable(model)
    if known is None:
        original(updater, run_post_load=run_post_load)
        return metrics.tell_update(model, UpdateReport(SESSION))
    error = None
    try:
        update = known.open or known.begin()
        with update.loading(model):
            original(updater, run_post_load=run_post_load)
        update.finish(model)
        _refuse_unopened(known)
    except Exception as raised:
        error = raised
    outcome = replace(_outcome(error, BEFORE_UPDATE), is_late=error is None and update.is_late)
    if outcome.failure is not None and known.open is None:
        _tell_failure(model, SESSION, outcome.failure)
    known.unopened = None
    outcomes = _session.get()
    if outcomes is not None:
        outcomes.append(outcome)
        return None
    outcome = _of_all(outcome)
    _settle(known, outcome)
    if outcome.failure is None:
        return None
    raise _error(outcome) from error


def end_session(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around ``SchedulerWeightUpdaterManager.end_weight_update``: let the end of a session fail, on all ranks.

    The models of all runners can be undone until all have ended. Upstream flushes the cache after calls only, so what
    requests have put there since is dropped if the end changes the weights again.
    """
    known = [found for _, runner in manager._select_runners() if (found := updatable(runner.model)) is not None]
    if not known:
        return original(manager, request)
    outcomes: list[Outcome] = []
    token = _session.set(outcomes)
    try:
        answer = original(manager, request)
    except BaseException as error:
        _settle_all(known, Outcome(f"{_sentence(_told(error))} {BEFORE_UPDATE}"))
        raise
    finally:
        _session.reset(token)
    outcome = _of_all(*outcomes)
    _settle_all(known, outcome)
    is_flushed = not (outcome.failure or outcome.is_late) or manager.flush_cache()
    if outcome.failure is None:
        return answer
    return type(answer)(success=False, message=outcome.failure if is_flushed else f"{outcome.failure} {_NOT_FLUSHED}")


def receive_weights(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``WeightUpdater.receive_weights_from_distributed``: if a rank fails here, no rank loads the weights.

    Raises:
        WeightUpdateError: some rank has not received the weights.
    """
    known = updatable(model_of(updater))
    if known is None:
        return original(updater, *args, **kwargs)
    received, error = None, None
    try:
        received = original(updater, *args, **kwargs)
    except Exception as raised:
        error = raised
    outcome = _of_all(_outcome(error, BEFORE_CALL))
    if outcome.failure is None:
        return received
    if known.open is not None:
        known.open.calls["broadcast"] += 1
        known.open.failed_calls += 1
        known.open.expect_again(inspect.signature(original).bind(updater, *args, **kwargs).arguments["names"])
    raise _error(outcome) from error


def load_weights_from_distributed(original: Callable[..., Answer], updater: Any, named_tensors: NamedTensors) -> Answer:
    """Around ``WeightUpdater.load_weights_from_distributed``."""
    named_tensors = list(named_tensors)
    names = [name for name, _ in named_tensors]
    return _answered(updater, lambda: original(updater, named_tensors), "broadcast", names)


def update_weights_from_distributed(original: Callable[..., Answer], updater: Any, *args: Any, **kwargs: Any) -> Answer:
    """Around ``update_weights_from_distributed``, which receives and loads the tensors of one call.

    Later releases have ``load_weights_from_distributed`` for the loading.
    """
    names = inspect.signature(original).bind(updater, *args, **kwargs).arguments["names"]
    return _answered(updater, lambda: original(updater, *args, **kwargs), "broadcast", names)


def update_weights_from_tensor(
    original: Callable[..., Answer], updater: Any, named_tensors: Any, load_format: str | None = None
) -> Answer:
    """Around ``WeightUpdater.update_weights_from_tensor``."""
    kind, names = _KINDS.get((load_format or "").rpartition(".")[2], "tensors"), _names_of(named_tensors)
    return _answered(updater, lambda: original(updater, named_tensors, load_format), kind, names)


def update_weights_from_ipc(original: Callable[..., Answer], updater: Any, request: Any) -> Answer:
    """Around ``WeightUpdater.update_weights_from_ipc``, which loads and post-processes."""
    return _answered(updater, lambda: original(updater, request), "ipc", is_whole=True)


def load_weights_direct(original: Callable[..., None], model: torch.nn.Module, named_tensors: NamedTensors) -> None:
    """Around ``_model_load_weights_direct``, which gets tensors by parameter names.

    fp8 values and scales go to the served parameters, as in stock; high-precision weights are streamed.

    Raises:
        WeightUpdateError: a layer cannot be updated with these values.
    """
    known, tensors = updatable(model), list(named_tensors)
    if known is None or known.open is None:
        refuse_casts(model, tensors)
        return original(model, tensors)
    mine = [(name, tensor) for name, tensor in tensors if known.open.takes(name) and tensor.dtype.itemsize > 1]
    names = {name for name, _ in mine}
    others = [(name, tensor) for name, tensor in tensors if name not in names]
    known.open.write_direct(model, others, functools.partial(original, model))
    for name, tensor in mine:
        known.open.given.offer(name, tensor)
    with known.open.loading(model):
        original(model, mine)
    return None


def move_experts(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``ExpertLocationUpdater.update``, which EPLB calls between two batches: experts stay during a session.

    Returns:
        As upstream's, the experts that could not be moved since their rank is gone: none.
    """
    if not any_in_session():
        return original(updater, *args, **kwargs)
    logger.info("StreamFP8: EPLB moves no experts while a weight update is open; its next rebalance will.")
    return {}


_disk: ContextVar[DiskUpdate | None] = ContextVar("streamfp8_disk_update", default=None)
_together: ContextVar[Together | None] = ContextVar("streamfp8_together", default=None)
_session: ContextVar[list[Outcome] | None] = ContextVar("streamfp8_session_end", default=None)


def _judged(
    known: UpdatableModel,
    model: torch.nn.Module,
    run: Callable[[WeightUpdate], Any],
    kind: str,
    names: Sequence[str] = (),
    disk: DiskUpdate | None = None,
    *,
    may_wait: bool = False,
) -> tuple[Any, Outcome]:
    """Run a call as part of the open update, or as an update of its own; all ranks keep it, or all undo it.

    Args:
        known: what is known of the model.
        model: the model that is updated.
        run: upstream's part.
        kind: of the call.
        names: of the call's tensors, if known.
        disk: the update from disk, if this is one.
        may_wait: whether later calls may bring what is missing although there is no session.

    Returns:
        What ``run`` returned, and the outcome of all ranks.
    """
    is_own = known.open is None
    result, error, mine = None, None, Outcome()
    waiting: Sequence[str] = ()
    try:
        _refuse_unopened(known)
        update = known.open or known.begin()
        update.calls[kind] += 1
        if not is_own:
            update.begin_call()
            if disk is not None and disk.is_whole:
                update.drop_parts()
        result = run(update)
        update.note_repeated()
        waiting = update.waiting(model) if may_wait else ()
        if (is_own or may_wait) and not waiting:
            update.finish(model)
        mine = replace(_found(update, model, disk if is_own else None), waiting=waiting)
    except Exception as raised:
        error = raised
        mine = _outcome(raised, BEFORE_UPDATE if is_own else BEFORE_CALL)
    if disk is not None:
        disk.is_judged = True
    outcome = _joined_with_earlier(_of_all(mine))
    if may_wait and (waiting or not is_own):
        _continue(known, outcome, names, is_own=is_own, waits=bool(waiting))
    elif is_own:
        _conclude(known, model, kind, outcome)
    else:
        _end_call(known, outcome, names)
    if outcome.failure is not None:
        logger.error(
            "StreamFP8: a weight update failed: %s", outcome.failure, exc_info=None if mine.is_partial else error
        )
    if disk is not None:
        disk.failure, disk.note = outcome.failure, _note(outcome)
    return result, outcome


def _conclude(known: UpdatableModel, model: torch.nn.Module, kind: str, outcome: Outcome) -> None:
    """Keep or undo an update by the outcome of all ranks; leave that to the request if it updates several models."""
    together = _together.get()
    if outcome.failure is not None and known.open is None:
        # Where a session could not be opened, its end tells.
        if known.unopened is None:
            _tell_failure(model, kind, outcome.failure)
    elif outcome.failure is not None or together is None:
        _settle(known, outcome)
    else:
        together.add(functools.partial(known.abort, _ANOTHER_FAILED), known.commit)


def _end_call(known: UpdatableModel, outcome: Outcome, names: Sequence[str]) -> None:
    """Keep or undo one call of a session."""
    if known.open is not None:
        known.open.keep_call() if outcome.failure is None else known.open.undo_call(names)


def _continue(known: UpdatableModel, outcome: Outcome, names: Sequence[str], *, is_own: bool, waits: bool) -> None:
    """As ``_conclude``, for one of several calls without a session.

    Args:
        known, outcome: as there.
        names: of the call's tensors.
        is_own: whether the call is the first.
        waits: whether some weights wait for later calls; otherwise the call is the last.
    """

    def undo() -> None:
        if is_own or known.open is None:
            known.abort(outcome.failure or _ANOTHER_FAILED)
        else:
            known.open.undo_call(names)

    keep = known.wait_for_more if waits else known.commit
    together = _together.get()
    if outcome.failure is not None:
        undo()
    elif together is None:
        keep()
    else:
        together.add(undo, keep)


def _settle(known: UpdatableModel, outcome: Outcome) -> None:
    """Keep or undo the open update, if any."""
    if outcome.failure is None:
        known.commit()
    else:
        known.abort(outcome.failure)


def _settle_all(known: Sequence[UpdatableModel], outcome: Outcome) -> None:
    # In reverse: a draft model may share memory with its target, which was updated first.
    for model in reversed(known):
        _settle(model, outcome)


def _found(update: WeightUpdate, model: torch.nn.Module, disk: DiskUpdate | None) -> Outcome:
    """The outcome of a call that succeeded.

    Raises:
        WeightUpdateError: a complete checkpoint has replaced nothing.
    """
    unused = update.given.unused
    if disk is None or not disk.is_whole:
        return Outcome(unused=unused)
    # What was used and not written belongs to other ranks: their experts.
    if update.is_empty and len(unused) == len(update.given.names):
        advice = Misplaced.among(unused, update.layers).advice
        raise WeightUpdateError(
            f"nothing of this checkpoint belongs to the model that is served: it brought {shortened(unused)}. {advice}"
            if unused
            else "this checkpoint holds no tensors"
        )
    untouched = update.untouched(model, disk.model_config)
    lacking = [name.partition(" ")[0].rpartition(".")[0] for name in untouched]
    return Outcome(unused=unused, untouched=untouched, advice=Misplaced.among(unused, lacking).advice)


def _outcome(error: Exception | None, weights: str) -> Outcome:
    if error is None:
        return Outcome()
    notes = (*getattr(error, "__notes__", ()), *noted_problems())
    told = "\n".join((f"{_sentence(_told(error))} {weights}", *notes))
    return Outcome(told, is_partial=isinstance(error, PartialUpdateError))


def _of_all(*mine: Outcome) -> Outcome:
    """The outcome of a call on all ranks of the tensor parallel group, the same on each of them.

    A collective: each rank has to call it exactly once, whether or not the call succeeded there.
    """
    try:
        ranks = gathered(mine)
    except Exception as error:
        # Some rank has died, and the group with it.
        return Outcome(
            f"the ranks could not compare what became of this call: {_sentence(_told(error))} {BEFORE_UPDATE}"
        )
    outcomes = [outcome for rank in ranks for outcome in rank]
    failed = {
        outcome.failure: f"rank {number}: {outcome.failure}" if len(ranks) > 1 else outcome.failure
        for number, rank in reversed([*enumerate(ranks)])
        for outcome in rank
        if outcome.failure is not None
    }
    common = [name for name in (outcomes[0].unused if outcomes else ()) if all(name in one.unused for one in outcomes)]
    return Outcome(
        " ".join(reversed(failed.values())) if failed else None,
        any(outcome.is_partial for outcome in outcomes),
        any(outcome.is_late for outcome in outcomes),
        () if parallel_ranks().pp.size > 1 else common,
        [*dict.fromkeys(name for outcome in outcomes for name in outcome.untouched)],
        next((outcome.advice for outcome in outcomes if outcome.advice), ""),
        [*dict.fromkeys(name for outcome in outcomes for name in outcome.waiting)],
    )


def _note(outcome: Outcome) -> str:
    told = []
    if outcome.untouched:
        told.append(
            f"What this checkpoint should hold and does not keeps its values: {shortened(outcome.untouched)} "
            f"({len(outcome.untouched)} in all)."
        )
        told += [outcome.advice] if outcome.advice else []
        logger.warning("StreamFP8: a weight update from disk is incomplete. %s", " ".join(told))
    if outcome.unused:
        told.append(f"Nothing took {len(outcome.unused)} of the tensors: {shortened(outcome.unused)}.")
    if outcome.waiting:
        told.append(
            f"{len(outcome.waiting)} weights keep their values until later calls bring what shares their scales: "
            f"{shortened(outcome.waiting)}."
        )
    return " ".join(told)


def _answered(
    updater: Any, call: Callable[[], Answer], kind: str, names: Sequence[str] = (), *, is_whole: bool = False
) -> Answer:
    """Upstream's answer to ``call``, run as part of the open update; failures are answers too, not exceptions.

    Without sessions, trainers send their buckets one by one and never say which is the last. So weights of which a call
    brings a part wait for the next ones. A tensor that comes again is the next update's.

    Args:
        updater: upstream's.
        call: upstream's own.
        kind: of update.
        names: of the call's tensors.
        is_whole: whether the call is an update by itself.
    """
    model = model_of(updater)
    known = updatable(model)
    if known is None:
        return _noted(updater, kind, call)
    may_wait = not is_whole and not has_sessions(updater)
    if is_whole or not known.arrived.isdisjoint(names):
        known.stop_waiting(model)

    def run(update: WeightUpdate) -> str:
        # A direct load may name served parameters: load_weights_direct tells them apart.
        with nullcontext() if kind == "direct" else update.loading(model):
            success, message = call()
        if not success:
            raise WeightUpdateError(message)
        return message

    message, outcome = _judged(known, model, run, kind, names, may_wait=may_wait)
    if outcome.failure is None:
        return True, _joined(message, _note(outcome))
    return False, outcome.failure


def _noted(updater: Any, kind: str, call: Callable[[], Answer]) -> Answer:
    """Upstream's answer of a model that is not streamed, recorded; it may have used any tensor."""
    began = time.perf_counter()
    try:
        with casts_refused(model_of(updater)):
            success, message = call()
    except WeightUpdateError as error:
        success, message = False, str(error)
    failure = None if success else message
    _joined_with_earlier(Outcome(failure))
    # All others are calls of sessions, where there are sessions.
    if kind in ("disk", "ipc") or not has_sessions(updater):
        report = UpdateReport(kind, time.perf_counter() - began, failure, {kind: 1})
        metrics.tell_update(model_of(updater), report)
    return success, message


def _tell_failure(model: torch.nn.Module, kind: str, failure: str) -> None:
    """Tell of an update that failed before it was opened."""
    metrics.tell_update(model, UpdateReport(kind, failure=failure))


def _joined_with_earlier(outcome: Outcome) -> Outcome:
    """A model's outcome merged with those of the models before it in the same request."""
    together = _together.get()
    return outcome if together is None else together.joined(outcome)


def _refuse_unopened(known: UpdatableModel) -> None:
    if known.unopened is not None:
        raise known.unopened


def _error(outcome: Outcome) -> WeightUpdateError:
    return (PartialUpdateError if outcome.is_partial else WeightUpdateError)(outcome.failure)


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, WeightUpdateError) else f"{type(error).__name__}: {error}"


def _sentence(text: str) -> str:
    return f"{text.rstrip('. ')}."


def _joined(message: str, note: str) -> str:
    return f"{_sentence(message)} {note}" if note else message


def _names_of(named_tensors: Any) -> list[str]:
    """Names in a list of named tensors, or in a flattened bucket."""
    if isinstance(named_tensors, dict):
        return [part.name for part in named_tensors.get("metadata", ())]
    return [named[0] for named in named_tensors] if isinstance(named_tensors, (list, tuple)) else []


def _seen(load: model_load.ModelLoad, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``, of which the load sees those of the Run:ai streamer here: ``get_all_weights`` sees all others."""
    for name, tensor, is_reused in _with_reuse(weights):
        if is_reused:
            load.checkpoint.see(name, tensor)
        yield name, tensor


def _offered(update: WeightUpdate, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``, after noting which of them come from a checkpoint and so stay unchanged."""
    for name, tensor, is_reused in _with_reuse(weights):
        if not is_reused:
            update.sources.offer(tensor)
        yield name, tensor


def _with_reuse(weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """``weights``, and whether each one's memory is the next one's too, as the Run:ai streamer's is."""
    from sglang.srt.model_loader.weight_utils import RUNAI_STREAMER_TENSOR_ATTR

    for name, tensor in weights:
        yield name, tensor, getattr(tensor, RUNAI_STREAMER_TENSOR_ATTR, False)
