import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from reports import load_report

import sglang_overlay
from sglang_overlay.observe.gauges import PREFIX, Gauges
from sglang_overlay.observe.load_metrics import LABELS, METRICS, state_of
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import (
    LayerCounts,
    LayerFigures,
    LayerNote,
    StagingUsage,
    UnitCounts,
)

LOAD = load_report(
    mode="streaming",
    seconds=5.5,
    memory=MemoryUsage("RssAnon", 4, 1_370, 1_300, ((0.0, 0), (2.5, 1_370))),
    final_bytes=1_290,
    units=UnitCounts(1234, 1000),
    staging=StagingUsage(31),
    layers=LayerCounts(
        2,
        deferred=(LayerNote("c", "MLA"),),
        fallback=(LayerNote("d", "odd"), LayerNote("e", "odd"), LayerNote("f", "odd")),
        figures=(LayerFigures("a", 1000, 1000, 800, 0.1, 0.2), LayerFigures("b", 234, 0, 90, 0.2, 0.3)),
    ),
    warnings=("one", "two"),
    missing=("x", "y", "z", "w"),
)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def gauges(registry):
    gauge = functools.partial(Gauge, registry=registry)
    return Gauges(gauge, METRICS, {"model_name": "moe", "tp_rank": 3}, LABELS)


def test_every_figure_is_shown_with_the_ranks_labels(gauges, registry):
    gauges.show(LOAD)
    labels = {"model_name": "moe", "tp_rank": "3", "role": "target", "mode": "streaming"}
    shown = {metric.name: registry.get_sample_value(f"{PREFIX}{metric.name}", labels) for metric in METRICS}
    assert shown == {
        "load_seconds": 5.5,
        "load_peak_bytes": 1_370,
        "model_bytes": 1_290,
        "streamed_bytes": 890,
        "staging_peak_bytes": 31,
        "units": 1234,
        "direct_units": 1000,
        "streamed_layers": 2,
        "deferred_layers": 1,
        "fallback_layers": 3,
        "missing_parameters": 4,
        "warnings": 2,
    }


def test_draft_model_has_series_of_its_own_and_a_later_load_replaces_an_earlier(gauges, registry):
    for load in (LOAD, replace(LOAD, role="draft", seconds=1.0), replace(LOAD, seconds=6.0)):
        gauges.show(load)
    lines = re.findall(r'load_seconds\{.*role="(\w+)".*\} (\S+)', generate_latest(registry).decode())
    assert sorted(lines) == [("draft", "1.0"), ("target", "6.0")]


def test_state_is_the_report_without_what_is_long():
    state = json.loads(json.dumps(state_of(LOAD)))
    assert state["memory"] == {"metric": "RssAnon", "start": 4, "peak_above_start": 1_370, "end_above_start": 1_300}
    assert state["layers"]["fallback"][0] == {"layer": "d", "reason": "odd"}
    assert "figures" not in state["layers"]
    assert (state["streamed_bytes"], state["units"]["streamed"], state["missing"]) == (890, 1234, ["x", "y", "z", "w"])
    assert LOAD.memory.samples


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_documented(metric):
    page = Path(sglang_overlay.__file__).parents[1] / "docs" / "report.md"
    assert f"| `{PREFIX}{metric.name}` |" in page.read_text()
