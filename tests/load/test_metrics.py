# SPDX-License-Identifier: Apache-2.0
"""Where SGLang's own places to tell of loads are not as expected, nobody is told and nothing else happens."""

from __future__ import annotations

import functools

import pytest
from prometheus_client import CollectorRegistry, Gauge
from reports import load_report
from sglang.srt.managers.io_struct import GetInternalStateReqOutput
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
from sglang.srt.server_args import ServerArgs
from workbench.loads import runtime

from sglang_overlay.load import metrics
from sglang_overlay.observe.gauges import PREFIX
from sglang_overlay.observe.memory import MemoryUsage

LABELS = {"model_name": "m", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
LOAD = load_report(mode="streaming", seconds=2.5, memory=MemoryUsage("RssAnon", 0, 3, 2), final_bytes=2)


@pytest.fixture(scope="module")
def made():
    """SGLang's own. One a process: some of its metrics go to the registry that all share."""
    server_args = ServerArgs(model_path="none", device="cpu")
    runtime.publish(server_args, rank=0)
    try:
        return SchedulerMetricsCollector(labels=LABELS, server_args=server_args)
    finally:
        runtime.take_down()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def collector(made, registry, monkeypatch):
    """Makes its gauges by what SGLang lets others put there, here with a registry of the test's own."""
    monkeypatch.setattr(made, "_gauge_cls", functools.partial(Gauge, registry=registry))
    return made


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(metrics, "_loads", [])
    monkeypatch.setattr(metrics, "_gauges", [])


def seconds(registry):
    return registry.get_sample_value(f"{PREFIX}load_seconds", {**LABELS, "role": "target", "mode": "streaming"})


def test_load_that_ended_before_the_metrics_were_made_is_shown(collector, registry):
    metrics.tell(LOAD)
    metrics.add_gauges(None, collector, labels={})
    assert seconds(registry) == 2.5


def test_load_that_ends_after_the_metrics_were_made_is_shown(collector, registry):
    metrics.add_gauges(None, collector, labels={})
    metrics.tell(LOAD)
    assert seconds(registry) == 2.5


def test_collector_without_labels_is_a_warning_and_not_an_error(caplog):
    metrics.add_gauges(None, object(), labels={})
    metrics.tell(LOAD)
    assert "loads and weights are not in /metrics: AttributeError" in caplog.text


def test_state_has_an_entry_once_something_was_loaded():
    output = GetInternalStateReqOutput(internal_state={"version": "1"})
    assert metrics.add_state(output).internal_state == {"version": "1"}
    metrics.tell(LOAD)
    (told,) = metrics.add_state(output).internal_state[metrics.STATE]
    assert (told["seconds"], told["mode"]) == (2.5, "streaming")
