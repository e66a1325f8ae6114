# SPDX-License-Identifier: Apache-2.0
"""Publish load metrics through SGLang's endpoints ``/metrics`` and ``/server_info``.

A load ends in the scheduler's process, after the scheduler has created its metrics; the other order works as well.
Errors here are only warnings: metrics must not stop a server.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_overlay.core.messages import sentence
from sglang_overlay.observe.load_metrics import LoadGauges, state_of
from sglang_overlay.observe.report import LoadReport

logger = logging.getLogger(__name__)

STATE = "streamfp8"
"""The entry of ``internal_states`` in ``/server_info``."""

_loads: list[LoadReport] = []
_gauges: list[LoadGauges] = []


def tell(load: LoadReport) -> None:
    """Publish a load of this process that has ended."""
    _loads.append(load)
    _show()


def add_gauges(_none: None, collector: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``SchedulerMetricsCollector.__init__``, which runs only with ``--enable-metrics``."""
    try:
        _gauges.append(LoadGauges(_gauge_class(collector), collector.labels))
    except Exception as error:
        _warn_of_metrics(error)
    _show()


def add_state(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    """After ``Scheduler.get_internal_state``: add the loads of this process."""
    if _loads:
        output.internal_state[STATE] = [state_of(load) for load in _loads]
    return output


def _show() -> None:
    for gauges in _gauges:
        for load in _loads:
            try:
                gauges.show(load)
            except Exception as error:
                _warn_of_metrics(error)


def _gauge_class(collector: Any) -> Any:
    replaced = getattr(collector, "_gauge_cls", None)
    if replaced is not None:
        return replaced
    # Imported late, as in SGLang: PROMETHEUS_MULTIPROC_DIR has to be set first.
    from prometheus_client import Gauge

    return Gauge


def _warn_of_metrics(error: Exception) -> None:
    logger.warning("StreamFP8: loads are not in /metrics: %s: %s", type(error).__name__, sentence(error))
