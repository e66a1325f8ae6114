import json
from dataclasses import replace

import jsonschema
import pytest
from reports import STOCK_LOAD, STREAMED_LOAD

from sglang_overlay.observe.folders import curves, lines, read_groups, subject
from sglang_overlay.observe.report import SCHEMA_FILE, LayerCounts, LayerFigures, ReportError, from_json, write


@pytest.fixture
def fleet(tmp_path):
    """Two pods below one folder, of which one was restarted, and stock loads elsewhere."""
    for place in ("fleet/pod-b", "fleet/pod-a", "fleet/pod-a", "stock"):
        write(STOCK_LOAD if place == "stock" else STREAMED_LOAD, tmp_path / place)
    return tmp_path / "fleet"


def test_folders_below_are_read_in_order_of_their_names(fleet):
    (group,) = read_groups([fleet])
    assert group.labels == ["pod-a TP0/1 #1", "pod-a TP0/1 #2", "pod-b TP0/1"]
    assert group.folders == [str(fleet / name) for name in ("pod-a", "pod-a", "pod-b")]
    assert group.name == str(fleet)
    assert group.label(group.loads[2]) == "pod-b TP0/1"


def test_two_folders_are_two_groups_with_stock_first_however_deep_they_are(fleet):
    stock, streamed = read_groups([fleet, fleet.parent / "stock"])
    assert [load.mode for load in stock.loads] == ["stock"]
    assert streamed.labels[2] == "pod-b TP0/1"


def test_more_folders_are_one_group(fleet):
    (group,) = read_groups([fleet / "pod-b", fleet / "pod-a", fleet.parent / "stock"])
    assert group.labels == ["fleet/pod-b TP0/1", "fleet/pod-a TP0/1 #1", "fleet/pod-a TP0/1 #2", "stock TP0/1"]
    assert group.differences[0] == "loaded as stock: stock TP0/1; 3 of 4 streamed"
    assert [curve.label for curve in curves([group])] == ["streaming", "stock"]


def test_folder_without_reports_is_an_error_wherever_others_have_some(fleet, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"no load reports .* in .*empty"):
        read_groups([fleet, tmp_path / "empty"])


def test_line_of_a_load_is_a_report_and_says_where_it_lies(fleet):
    big = replace(STREAMED_LOAD, layers=LayerCounts(1, figures=(LayerFigures("a", 2, 1, 640),)), node="n1")
    write(big, fleet / "pod-c")
    found = [json.loads(json.dumps(line)) for line in lines(read_groups([fleet]))]
    assert [line["folder"] for line in found] == [str(fleet / name) for name in ("pod-a", "pod-a", "pod-b", "pod-c")]
    assert (found[3]["streamed_bytes"], found[3]["node"], "figures" in found[3]["layers"]) == (640, "n1", False)
    jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(found[3])
    shortened = replace(big.memory, samples=())
    assert from_json(found[3]) == replace(big, memory=shortened, layers=LayerCounts(1))


def test_subject_names_each_model_once():
    other = replace(STREAMED_LOAD, model_path="models/other")
    assert subject([STREAMED_LOAD, replace(STREAMED_LOAD, model_path="/mnt/moe-1b"), other]) == (
        "moe-1b, other, SGLang 0.5.23"
    )
