# SPDX-License-Identifier: Apache-2.0
"""Where SGLang updates weights: the model runner or its ``WeightUpdater``, the scheduler's sessions, and the loader.

Upstream reports a failed update in three ways: some methods return ``(False, message)``, others raise, which ends the
server, and the end of a session cannot fail at all; each rank answers for itself, and only the first is heard. Here
every update of streamed weights is judged by all tensor parallel ranks together, once a call. Where one of them failed,
all put back what they held before, and answer ``success=False`` with a message that says so.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_overlay.core.errors import shortened
from sglang_overlay.core.executor import Executor, executor_for
from sglang_overlay.core.tensor_names import Misplaced
from sglang_overlay.errors import PartialUpdateError, WeightUpdateError
from sglang_overlay.load import model_load
from sglang_overlay.load.checkpoint_files import CheckpointFiles, noted_problems
from sglang_overlay.load.ranks import gathered, parallel_ranks
from sglang_overlay.update.model import UpdatableModel, updatable
from sglang_overlay.update.session import WeightUpdate
from sglang_overlay.update.updaters import has_sessions, model_of

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Answer = tuple[bool, str]

BEFORE_UPDATE = "All weights are those of before this update."
"""What an answer says of the weights when an update has failed."""
BEFORE_CALL = "All weights are those of before this call. The update goes on: send again what this call was to bring."
"""The same of one call of several."""
_NO_SESSIONS = "This release of SGLang has no update sessions: each call is an update of its own."


@dataclass
class DiskUpdate:
    """An update from disk that is under way.

    Attributes:
        model_config: upstream's; it names the folder.
        is_whole: the folder is read in full, as a checkpoint that replaces all weights.
        is_judged: the ranks have compared their outcomes.
        failure: what went wrong, once all ranks know.
        note: what else is to be told.
    """

    model_config: Any
    is_whole: bool
    is_judged: bool = False
    failure: str | None = None
    note: str = ""


class Together:
    """Updates of a target and its drafts that one request asks for: all of them stay, or none.

    Attributes:
        failed: one of the models could not be updated.
    """

    def __init__(self) -> None:
        self.failed = False
        self._told: Outcome | None = None
        self._undo: list[Callable[[], None]] = []
        self._close: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None], close: Callable[[], None] = lambda: None) -> None:
        """Note what undoes a part that was right, and what is to be done in any case."""
        self._undo.append(undo)
        self._close.append(close)

    def joined(self, outcome: Outcome) -> Outcome:
        """An outcome of one model's as the answer tells it: upstream's is that of the last, which has to tell all."""
        self.failed |= outcome.failure is not None
        earlier, self._told = self._told, outcome
        if earlier is not None:
            self._told = replace(
                outcome,
                unused=[name for name in outcome.unused if name in earlier.unused],
                untouched=[*earlier.untouched, *outcome.untouched],
                advice=earlier.advice or outcome.advice,
            )
        return self._told

    def end(self) -> None:
        """Undo everything where a model could not be updated, on any rank."""
        if self._undo:
            # Models that are not streamed answer for one rank.
            self.failed = _of_all(Outcome("" if self.failed else None)).failure is not None
        # Backwards: a draft model may share memory with its target, which was updated first.
        for step in [*(reversed(self._undo) if self.failed else ()), *self._close]:
            step()


@dataclass(frozen=True)
class Outcome:
    """How one rank fared in one call; all ranks of a tensor parallel group exchange theirs.

    Attributes:
        failure: what went wrong.
        is_partial: that is units of which only a part came.
        unused: names of tensors that nothing was done with.
        untouched: what a whole checkpoint should have replaced.
        advice: what to do about that.
    """

    failure: str | None = None
    is_partial: bool = False
    unused: Sequence[str] = ()
    untouched: Sequence[str] = ()
    advice: str = ""


def load_weights_and_postprocess(
    original: Callable[..., None], model: torch.nn.Module, weights: NamedTensors, target_device: torch.device
) -> None:
    """Around ``DefaultModelLoader.load_weights_and_postprocess``, which updates from disk call again.

    Upstream calls it once more where it has failed, to read "the original weights": what is served then are those
    already, and they need not have come from the folder that it would read.

    Raises:
        WeightUpdateError: reading or quantizing failed on some rank.
    """
    known = updatable(model)
    if known is None or model_load.current() is not None:
        return original(model, weights, target_device)
    disk = _disk.get()
    if disk is not None and disk.failure is not None:
        return None

    def read(update: WeightUpdate) -> None:
        with update.loading(model):
            original(model, _offered(update, weights), target_device)

    _, outcome = _judged(known, model, read, executor=executor_for(target_device), disk=disk)
    if outcome.failure is None:
        return None
    raise _error(outcome)


def update_weights_from_disk(
    original: Callable[..., Answer], updater: Any, model_path: str, *args: Any, **kwargs: Any
) -> Answer:
    """Around ``WeightUpdater.update_weights_from_disk``.

    The path of the model is put back where the update fails, before upstream reads "the original weights" from it. A
    rank that fails before it reads any weights tells the others, which wait for it.
    """
    if updatable(model_of(updater)) is None:
        return _noted(original(updater, model_path, *args, **kwargs))
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
        message = f"Failed to update weights: {_told(error)}"
        if disk.is_judged and disk.failure is None:
            message = f"The new weights are served, but what follows failed: {_told(error)}"
    finally:
        _disk.reset(token)
    if not disk.is_judged:
        outcome = _of_all(Outcome(None if success else f"{_sentence(message)} {BEFORE_UPDATE}"))
        disk.failure = outcome.failure
        _joined_with_earlier(outcome)
    elif disk.failure is not None:
        message = f"Failed to update weights: {disk.failure}"
    if disk.failure is not None or not success:
        updater.model_config.model_path = served
        return False, message if disk.is_judged else (disk.failure or message)
    together = _together.get()
    if together is not None:
        together.add(functools.partial(setattr, updater.model_config, "model_path", served))
    return True, _joined(message, disk.note)


def update_of_all_models(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around ``SchedulerWeightUpdaterManager.update_weights_from_disk`` and its like: target first, then drafts.

    Upstream stops at the first that fails. Then those before it go back to their weights as well.
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
    """Around ``WeightUpdater.begin_weight_update``, which cannot fail: that is left to its calls and its end."""
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
    error = None
    try:
        update = known.open or known.begin()
        with update.loading(model):
            original(updater, run_post_load=run_post_load)
        update.finish(model)
        _refuse_unopened(known)
    except Exception as raised:
        error = raised
    outcome = _outcome(error, BEFORE_UPDATE)
    known.unopened = None
    outcomes = _session.get()
    if outcomes is not None:
        outcomes.append(outcome)
        return None
    outcome = _of_all(outcome)
    if outcome.failure is None:
        known.commit()
        return None
    known.abort()
    raise _error(outcome) from error


def end_session(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around ``SchedulerWeightUpdaterManager.end_weight_update``: let the end of a session fail, on all ranks.

    The models of all runners keep what they have overwritten until all have ended.
    """
    known = [found for _, runner in manager._select_runners() if (found := updatable(runner.model)) is not None]
    if not known:
        return original(manager, request)
    outcomes: list[Outcome] = []
    token = _session.set(outcomes)
    try:
        answer = original(manager, request)
    except BaseException:
        _close(known, UpdatableModel.abort)
        raise
    finally:
        _session.reset(token)
    outcome = _of_all(*outcomes)
    _close(known, UpdatableModel.commit if outcome.failure is None else UpdatableModel.abort)
    return answer if outcome.failure is None else type(answer)(success=False, message=outcome.failure)


def receive_weights(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``WeightUpdater.receive_weights_from_distributed``: a rank that fails here would not load with the others.

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
        known.open.expect_again(inspect.signature(original).bind(updater, *args, **kwargs).arguments["names"])
    raise _error(outcome) from error


def load_weights_from_distributed(original: Callable[..., Answer], updater: Any, named_tensors: NamedTensors) -> Answer:
    """Around ``WeightUpdater.load_weights_from_distributed``."""
    named_tensors = list(named_tensors)
    return _answered(updater, lambda: original(updater, named_tensors), [name for name, _ in named_tensors])


def update_weights_from_distributed(original: Callable[..., Answer], updater: Any, *args: Any, **kwargs: Any) -> Answer:
    """Around ``update_weights_from_distributed``, which receives and loads the tensors of one call.

    Later releases have ``load_weights_from_distributed`` for the second half.
    """
    return _answered(updater, lambda: original(updater, *args, **kwargs))


def update_weights_from_tensor(
    original: Callable[..., Answer], updater: Any, named_tensors: Any, load_format: str | None = None
) -> Answer:
    """Around ``WeightUpdater.update_weights_from_tensor``."""
    return _answered(
        updater, lambda: original(updater, named_tensors, load_format), _names_of(named_tensors), load_format
    )


def update_weights_from_ipc(original: Callable[..., Answer], updater: Any, request: Any) -> Answer:
    """Around ``WeightUpdater.update_weights_from_ipc``, which post-processes what it has loaded."""
    return _answered(updater, lambda: original(updater, request))


def load_weights_direct(original: Callable[..., None], model: torch.nn.Module, named_tensors: NamedTensors) -> None:
    """Around ``_model_load_weights_direct``, whose names are those of parameters.

    Values that are fp8 already, and scales, go to the parameters that are served, as in stock.

    Raises:
        WeightUpdateError: a layer cannot be updated with these values.
    """
    known = updatable(model)
    if known is None or known.open is None:
        return original(model, named_tensors)
    tensors = list(named_tensors)
    mine = [(name, tensor) for name, tensor in tensors if known.open.takes(name) and tensor.dtype.itemsize > 1]
    names = {name for name, _ in mine}
    others = [(name, tensor) for name, tensor in tensors if name not in names]
    known.open.write_direct(model, others, functools.partial(original, model))
    for name, tensor in mine:
        known.open.given.offer(name, tensor)
    with known.open.loading(model):
        original(model, mine)
    return None


_disk: ContextVar[DiskUpdate | None] = ContextVar("streamfp8_disk_update", default=None)
_together: ContextVar[Together | None] = ContextVar("streamfp8_together", default=None)
_session: ContextVar[list[Outcome] | None] = ContextVar("streamfp8_session_end", default=None)


def _judged(
    known: UpdatableModel,
    model: torch.nn.Module,
    run: Callable[[WeightUpdate], Any],
    names: Sequence[str] = (),
    executor: Executor | None = None,
    disk: DiskUpdate | None = None,
) -> tuple[Any, Outcome]:
    """Run a call as a part of the open update, or as one of its own; keep or undo it, as all ranks agree.

    Args:
        known: what is known of the model.
        model: that is updated.
        run: upstream's part.
        names: of the tensors that it is to bring, where they are known.
        executor: does the work; one without threads unless given.
        disk: the update from disk that this is.

    Returns:
        What ``run`` returned, and the outcome of all ranks.
    """
    is_own = known.open is None
    result, error, mine = None, None, Outcome()
    try:
        _refuse_unopened(known)
        update = known.open or known.begin(executor)
        if not is_own:
            update.begin_call()
        result = run(update)
        if is_own:
            update.finish(model)
        mine = _found(update, model, disk if is_own else None)
    except Exception as raised:
        error = raised
        mine = _outcome(raised, BEFORE_UPDATE if is_own else BEFORE_CALL)
    if disk is not None:
        disk.is_judged = True
    outcome = _joined_with_earlier(_of_all(mine))
    if is_own:
        _conclude(known, outcome)
    elif known.open is not None:
        known.open.keep_call() if outcome.failure is None else known.open.undo_call(names)
    if outcome.failure is not None:
        logger.error(
            "StreamFP8: a weight update failed: %s", outcome.failure, exc_info=None if mine.is_partial else error
        )
    if disk is not None:
        disk.failure, disk.note = outcome.failure, _note(outcome)
    return result, outcome


def _conclude(known: UpdatableModel, outcome: Outcome) -> None:
    """Keep or undo an update, as all ranks agree; or leave that to the request that brought it to several models."""
    together = _together.get()
    if outcome.failure is not None:
        known.abort()
    elif together is None:
        known.commit()
    else:
        update = known.detach()
        together.add(update.undo, update.close)


def _found(update: WeightUpdate, model: torch.nn.Module, disk: DiskUpdate | None) -> Outcome:
    """What there is to tell of a call that was right.

    Raises:
        WeightUpdateError: a whole checkpoint has replaced nothing.
    """
    unused = update.given.unused
    if disk is None or not disk.is_whole:
        return Outcome(unused=unused)
    if update.is_empty:
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

    To be called exactly once by each rank, whatever became of the call there.
    """
    try:
        ranks = gathered(mine)
    except Exception as error:
        # Some rank is gone, and with it the group.
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
        () if parallel_ranks().pp.size > 1 else common,
        [*dict.fromkeys(name for outcome in outcomes for name in outcome.untouched)],
        next((outcome.advice for outcome in outcomes if outcome.advice), ""),
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
    return " ".join(told)


def _answered(
    updater: Any, call: Callable[[], Answer], names: Sequence[str] = (), load_format: str | None = None
) -> Answer:
    """Upstream's answer to ``call``, made as a part of the open update; a failure is an answer too."""
    model = model_of(updater)
    known = updatable(model)
    if known is None:
        return _noted(call())

    def run(update: WeightUpdate) -> str:
        # A direct load has names of served parameters among its own: load_weights_direct tells them apart.
        with nullcontext() if load_format == "direct" else update.loading(model):
            success, message = call()
        if not success:
            raise WeightUpdateError(message)
        return message

    message, outcome = _judged(known, model, run, names)
    if outcome.failure is None:
        return True, _joined(message, _note(outcome))
    if outcome.is_partial and not has_sessions(updater):
        return False, f"{outcome.failure} {_NO_SESSIONS}"
    return False, outcome.failure


def _noted(answer: Answer) -> Answer:
    """An answer for a model that is not streamed, which may have taken any tensor."""
    _joined_with_earlier(Outcome(None if answer[0] else answer[1]))
    return answer


def _joined_with_earlier(outcome: Outcome) -> Outcome:
    """An outcome of one model's with those before it of the request that it belongs to."""
    together = _together.get()
    return outcome if together is None else together.joined(outcome)


def _refuse_unopened(known: UpdatableModel) -> None:
    if known.unopened is not None:
        raise known.unopened


def _close(known: Sequence[UpdatableModel], how: Callable[[UpdatableModel], None]) -> None:
    # Backwards: a draft model may share memory with its target, which was updated first.
    for model in reversed(known):
        how(model)


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


def _offered(update: WeightUpdate, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``, with it noted which come from a checkpoint and so stay as they are."""
    from sglang.srt.model_loader.weight_utils import RUNAI_STREAMER_TENSOR_ATTR

    for name, tensor in weights:
        # The Run:ai streamer writes the next tensor into the same memory.
        if not getattr(tensor, RUNAI_STREAMER_TENSOR_ATTR, False):
            update.sources.offer(tensor)
        yield name, tensor
