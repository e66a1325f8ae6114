"""The dashboard's JSON; ``ci/dashboard`` asks a real Prometheus, every night."""

from __future__ import annotations

import json
import re

import pytest
from workbench.docs.dashboard import ANY_NAME, DASHBOARD, alerts, expressions, unknown_metrics

from sglang_overlay.observe.load_metrics import LABELS

DATA = json.loads(DASHBOARD.read_text(encoding="utf-8"))
ASKED = list(expressions(DATA))
KNOWN_LABELS = {"instance", "model_name", "tp_rank", "pp_rank", "__name__", *LABELS}
"""Prometheus's own, those that SGLang gives each rank's metrics (``SchedulerMetricsCollector``), and this package's."""


@pytest.mark.parametrize("expression", [*ASKED, *alerts()], ids=lambda found: found.text)
def test_expression_asks_for_metrics_and_labels_that_are_exported(expression):
    assert ANY_NAME in expression.text
    assert unknown_metrics(expression.text) == []
    selectors = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression.text)
    grouped = [name for by in re.findall(r"\bby \(([^)]*)\)", expression.text) for name in by.split(", ")]
    assert {*selectors, *grouped} <= KNOWN_LABELS


def test_metric_that_is_not_exported_is_noticed():
    text = f'{{__name__=~"{ANY_NAME}(units|unit)"}} / {{__name__=~"{ANY_NAME}load_second"}}'
    assert unknown_metrics(text) == ["unit", "load_second"]


def test_legends_name_labels_that_are_exported():
    legends = [target["legendFormat"] for panel in DATA["panels"] for target in panel["targets"]]
    named = {name for legend in legends for name in re.findall(r"{{(\w+)}}", legend)}
    assert named
    assert named <= KNOWN_LABELS


def test_everything_follows_the_chosen_data_source_model_and_instance():
    assert len(ASKED) >= 20
    for panel in DATA["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["expr"].count('instance=~"$instance"') == target["expr"].count(ANY_NAME)
            assert target["expr"].count('model_name=~"$model"') == target["expr"].count(ANY_NAME)
    assert [variable["name"] for variable in DATA["templating"]["list"]] == ["datasource", "model", "instance"]


def test_panels_lie_beside_one_another():
    taken = set()
    for panel in DATA["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DATA["panels"]}) == len(DATA["panels"])


def test_columns_of_the_table_are_named_for_its_targets():
    (table,) = (panel for panel in DATA["panels"] if panel["type"] == "table")
    (organize,) = (step for step in table["transformations"] if step["id"] == "organize")
    assert list(organize["options"]["renameByName"]) == [f"Value #{target['refId']}" for target in table["targets"]]
    shown = set(organize["options"]["renameByName"].values())
    assert {override["matcher"]["options"] for override in table["fieldConfig"]["overrides"]} <= shown
