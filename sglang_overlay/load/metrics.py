# SPDX-License-Identifier: Apache-2.0
"""Publish loads, updates and what is served through SGLang's endpoints ``/metrics``, ``/server_info`` and
``/weights_checker``.

A load ends in the scheduler's process, after the scheduler has created its metrics; the other order works as well.
Checksums are computed in such processes only, once all models are loaded.
Errors here are only warnings: metrics must not stop a server.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

from sglang_overlay.core.messages import sentence
from sglang_overlay.load import shared_state
from sglang_overlay.load.ranks import gathered, parallel_ranks
from sglang_overlay.load.served_weights import ServedWeights
from sglang_overlay.observe import load_metrics, weights_metrics, weights_report
from sglang_overlay.observe.gauges import Gauges
from sglang_overlay.observe.report import LoadReport
from sglang_overlay.observe.weights_report import UpdateReport, WeightsReport, layers_to_json, to_json

logger = logging.getLogger(__name__)

STATE = "streamfp8"
"""The entry of ``internal_states`` in ``/server_info`` that tells of the loads of one scheduler."""

_loads: list[LoadReport] = []
_served: weakref.WeakKeyDictionary[torch.nn.Module, ServedWeights] = weakref.WeakKeyDictionary()
_gauges: list[_RankGauges] = []
_is_serving = False


class _RankGauges:
    """All gauges of one rank."""

    def __init__(self, collector: Any) -> None:
        gauge, labels = _gauge_class(collector), collector.labels
        self._loads = Gauges(gauge, load_metrics.METRICS, labels, load_metrics.LABELS)
        self._checksums = Gauges(gauge, weights_metrics.CHECKSUM_METRICS, labels, weights_metrics.CHECKSUM_LABELS)
        self._updates = Gauges(gauge, weights_metrics.UPDATE_METRICS, labels, weights_metrics.UPDATE_LABELS)

    def show(self) -> None:
        """Set them to what there is to tell."""
        for load in _loads:
            self._loads.show(load)
        for report in _reports():
            self._checksums.show(report)
            update = weights_metrics.last_update(report)
            if update is not None:
                self._updates.show(update)


def tell(load: LoadReport) -> None:
    """Publish a load of this process that has ended."""
    _loads.append(load)
    _show()


def serve(model: torch.nn.Module, weights: ServedWeights) -> None:
    """Publish the weights of a model as long as it lives."""
    _served[model] = weights


def tell_update(model: torch.nn.Module, update: UpdateReport) -> None:
    """Publish an update of a model that has ended, and what is served now."""
    weights = _served.get(model)
    if weights is not None:
        weights.note(update)
        _publish(weights)


def begin_serving(_none: None, *_args: Any, **_kwargs: Any) -> None:
    """After ``Scheduler.__init__``, which loads all models of a process."""
    global _is_serving
    _is_serving = True
    _publish(*_served.values())


def add_gauges(_none: None, collector: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``SchedulerMetricsCollector.__init__``, which runs only with ``--enable-metrics``."""
    try:
        _gauges.append(_RankGauges(collector))
    except Exception as error:
        _warn("are not in /metrics", error)
    _show()


def add_state(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    """After ``Scheduler.get_internal_state``: add the loads of this process, and the weights of all ranks."""
    if _loads:
        output.internal_state[STATE] = [load_metrics.state_of(load) for load in _loads]
    if _served:
        output.internal_state[weights_report.STATE] = _all_weights()
    return output


def check_weights(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around ``SchedulerWeightUpdaterManager.check_weights``, the handler of ``/weights_checker``.

    With the action ``streamfp8_weights``, computes all checksums anew. The answer's message is JSON: what each rank
    serves, with the checksums of layers. Ranks of other pipeline stages get there later: of these, what they have
    published last.
    """
    if request.action != weights_report.STATE:
        return original(manager, request)
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.managers.io_struct import CheckWeightsReqOutput

    if GPU_MEMORY_TYPE_WEIGHTS in manager.offload_tags:
        return CheckWeightsReqOutput(success=False, message="The weights' memory is released: resume it first.")
    begin_serving(None)
    mine = [layers_to_json(weights.report) for weights in _served.values()]
    # A collective, as upstream's own check is. It is here that all ranks of a stage have computed anew.
    checked = [report for rank in gathered(mine) for report in rank]
    others = [report for report in _all_weights() if report["ranks"]["pp"]["rank"] != parallel_ranks().pp.rank]
    return CheckWeightsReqOutput(success=True, message=json.dumps([*checked, *others]))


def _publish(*changed: ServedWeights) -> None:
    """Tell of the weights of this process, some of which are not what they were; not in one that serves nobody."""
    if not _is_serving:
        return
    for weights in changed:
        try:
            weights.compute_checksum()
        except Exception as error:
            _warn("have no checksum", error)
    try:
        shared_state.publish(weights_report.STATE, [to_json(report) for report in _reports()])
    except Exception as error:
        _warn("are not all in /server_info", error)
    _show()


def _all_weights() -> list[dict[str, Any]]:
    try:
        return [report for rank in shared_state.published(weights_report.STATE) for report in rank]
    except Exception as error:
        _warn("are not all in /server_info", error)
        return [to_json(report) for report in _reports()]


def _reports() -> list[WeightsReport]:
    return [weights.report for weights in _served.values()]


def _show() -> None:
    for gauges in _gauges:
        try:
            gauges.show()
        except Exception as error:
            _warn("are not in /metrics", error)


def _gauge_class(collector: Any) -> Any:
    replaced = getattr(collector, "_gauge_cls", None)
    if replaced is not None:
        return replaced
    # Imported late, as in SGLang: PROMETHEUS_MULTIPROC_DIR has to be set first.
    from prometheus_client import Gauge

    return Gauge


def _warn(what: str, error: Exception) -> None:
    logger.warning("StreamFP8: loads and weights %s: %s: %s", what, type(error).__name__, sentence(error))
