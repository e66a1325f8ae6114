from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

import sglang_overlay
from sglang_overlay.observe.gauges import PREFIX, Gauges
from sglang_overlay.observe.report import ParallelRank, Ranks
from sglang_overlay.observe.weights_metrics import (
    CHECKSUM_LABELS,
    CHECKSUM_METRICS,
    UPDATE_LABELS,
    UPDATE_METRICS,
    last_update,
)
from sglang_overlay.observe.weights_report import (
    MAX_NAMES,
    Checksum,
    UpdateReport,
    WeightsReport,
    layers_to_json,
    to_json,
)

CHECKSUM = Checksum("ffffffffffff0123", {"model.norm": "0123456789abcdef"}, bytes=640, seconds=0.25)
NAMES = tuple(f"layers.{index}.proj.weight" for index in range(MAX_NAMES + 1))
UPDATE = UpdateReport("session", 1.5, None, {"buckets": 2, "tensors": 1}, 1, 7, 9, 4096, NAMES)
WEIGHTS = WeightsReport(
    "draft", Ranks(tp=ParallelRank(1, 2)), CHECKSUM, {"session": 3, "disk": 1}, {"session": 2}, UPDATE
)


def shown(metrics, labels, report):
    registry = CollectorRegistry()
    Gauges(functools.partial(Gauge, registry=registry), metrics, {"tp_rank": 1}, labels).show(report)
    values = {"tp_rank": "1", **{name: getattr(report, name) for name in labels}}
    text = generate_latest(registry).decode()
    return {metric.name: registry.get_sample_value(f"{PREFIX}{metric.name}", values) for metric in metrics}, text


def test_checksum_is_exact_in_the_number_that_prometheus_reads():
    values, text = shown(CHECKSUM_METRICS, CHECKSUM_LABELS, WEIGHTS)
    assert values == {"weights_checksum": 0xFFFFFFFFFFFF, "weights_checksum_seconds": 0.25}
    (line,) = (line for line in text.splitlines() if line.startswith(f"{PREFIX}weights_checksum{{"))
    assert float(line.split()[-1]) == 0xFFFFFFFFFFFF


def test_figures_are_those_of_the_last_update_and_counts_those_of_its_kind():
    values, _ = shown(UPDATE_METRICS, UPDATE_LABELS, last_update(WEIGHTS))
    assert values == {
        "weight_updates": 3,
        "weight_update_failures": 2,
        "weight_update_seconds": 1.5,
        "weight_update_units": 7,
        "weight_update_bytes": 4096,
        "weight_update_untouched_parameters": len(NAMES),
    }


def test_before_the_first_checksum_there_is_no_number_and_before_the_first_update_nothing_to_show():
    weights = WeightsReport("target", Ranks())
    values, _ = shown(CHECKSUM_METRICS, CHECKSUM_LABELS, weights)
    assert all(map(math.isnan, values.values()))
    assert last_update(weights) is None
    assert [to_json(weights)[name] for name in ("checksum", "checksum_seconds", "last_update")] == [None, None, None]


def test_json_names_some_of_what_was_left_untouched_and_leaves_layers_out():
    told = json.loads(json.dumps(to_json(WEIGHTS)))
    assert told["checksum"] == "ffffffffffff0123"
    assert told["last_update"]["untouched"] == {"parameters": len(NAMES), "names": [*NAMES[:MAX_NAMES]]}
    assert told["last_update"]["calls"] == {"buckets": 2, "tensors": 1}
    assert told["updates"] == {"session": 3, "disk": 1}
    assert "layers" not in told
    assert json.loads(json.dumps(layers_to_json(WEIGHTS))) == {**told, "layers": {"model.norm": "0123456789abcdef"}}


@pytest.mark.parametrize("metric", [*CHECKSUM_METRICS, *UPDATE_METRICS], ids=lambda metric: metric.name)
def test_every_metric_is_documented(metric):
    page = Path(sglang_overlay.__file__).parents[1] / "docs" / "report.md"
    assert f"| `{PREFIX}{metric.name}` |" in page.read_text()
