import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import load_report

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import (
    SCHEMA_FILE,
    LayerCounts,
    LayerFigures,
    LayerNote,
    LoadReport,
    ParallelRank,
    Ranks,
    ReportError,
    StagingUsage,
    UnitCounts,
    from_json,
    read,
    read_folder,
    read_tree,
    summary_line,
    to_json,
    write,
)

STREAMED = load_report(
    model_path="models/deepseek",
    mode="streaming",
    seconds=5.6,
    memory=MemoryUsage("RssAnon", 400_000_000, 1_370_000_000, 1_300_000_000, ((0.0, 0), (2.5, 1_370_000_000))),
    final_bytes=1_290_000_000,
    ranks=Ranks(tp=ParallelRank(1, 2), ep=ParallelRank(1, 2)),
    units=UnitCounts(streamed=1234, direct=1000),
    staging=StagingUsage(peak_bytes=3_100_000),
    layers=LayerCounts(
        streamed=210,
        deferred=(LayerNote("model.layers.0.self_attn.kv_b_proj", "MLA absorbs it"), LayerNote("b", "MLA absorbs it")),
        fallback=(),
        figures=(LayerFigures("model.layers.0.mlp.experts", 128, 120, 6_400_512, 0.25, 1.5),),
    ),
    missing=("model.norm.weight",),
    warnings=("a [1,\n 2] in a text stays as it is",),
)


ADDED = {"missing", "figures", "scheme", "node"}
"""Fields that the first reports of version 1 had not."""


def _validator():
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


_SIZES = st.integers(0, 2**50)
_RANK = st.builds(ParallelRank, rank=st.integers(0, 64), size=st.integers(1, 64))
_NOTES = st.lists(st.builds(LayerNote, layer=st.text(), reason=st.text()), max_size=3).map(tuple)
_SECONDS = st.floats(0, 1e6, allow_nan=False)
_FIGURES = st.lists(
    st.builds(
        LayerFigures,
        layer=st.text(),
        units=_SIZES,
        direct=_SIZES,
        bytes=_SIZES,
        first_seconds=_SECONDS,
        last_seconds=_SECONDS,
    ),
    max_size=3,
).map(tuple)
REPORTS = st.builds(
    LoadReport,
    release=st.text(),
    overlay_version=st.text(),
    model_path=st.text(),
    load_format=st.text(),
    mode=st.sampled_from(["stock", "streaming"]),
    role=st.sampled_from(["target", "draft"]),
    seconds=_SECONDS,
    memory=st.builds(
        MemoryUsage,
        metric=st.text(),
        start=_SIZES,
        peak_above_start=_SIZES,
        end_above_start=st.integers(-(2**50), 2**50),
        samples=st.lists(st.tuples(_SECONDS, st.integers(-(2**50), 2**50)), max_size=5).map(tuple),
    ),
    final_bytes=_SIZES,
    ranks=st.builds(Ranks, tp=_RANK, pp=_RANK, ep=_RANK),
    units=st.builds(UnitCounts, streamed=_SIZES, direct=_SIZES),
    staging=st.builds(StagingUsage, peak_bytes=_SIZES),
    layers=st.builds(LayerCounts, streamed=_SIZES, deferred=_NOTES, fallback=_NOTES, figures=_FIGURES),
    missing=st.lists(st.text(), max_size=3).map(tuple),
    warnings=st.lists(st.text(), max_size=3).map(tuple),
    node=st.text(),
)


@settings(deadline=None)
@given(report=REPORTS)
def test_any_report_comes_back_as_written_and_matches_the_published_schema(report, tmp_path_factory):
    file = write(report, tmp_path_factory.mktemp("reports"))
    assert read(file) == report
    _validator().validate(json.loads(file.read_text()))


def test_published_schema_describes_and_requires_every_field():
    """A field added to the dataclasses has to be published too."""

    def compare(schema, data, definitions):
        schema = {**definitions.get(schema.get("$ref", "").rpartition("/")[2], {}), **schema}
        if isinstance(data, dict):
            assert set(schema["properties"]) == set(data)
            assert set(schema["required"]) == set(data) - ADDED
            for name, value in data.items():
                compare(schema["properties"][name], value, definitions)

    schema = json.loads(SCHEMA_FILE.read_text())
    compare(schema, json.loads(json.dumps(to_json(STREAMED))), schema["$defs"])


def test_schema_refuses_what_is_not_a_report():
    data = json.loads(json.dumps(to_json(STREAMED)))
    for change in ({"mode": "magic"}, {"version": 2}, {"final_bytes": -1}, {"seconds": "5"}):
        assert not _validator().is_valid({**data, **change})


def test_samples_and_layers_are_one_to_a_line(tmp_path):
    text = write(STREAMED, tmp_path).read_text()
    assert "      [2.5, 1370000000]\n" in text
    assert '      {"layer": "model.layers.0.self_attn.kv_b_proj", "reason": "MLA absorbs it"},\n' in text
    assert '      {"layer": "model.layers.0.mlp.experts", "units": 128, "direct": 120, "bytes": 6400512, ' in text


def test_loads_of_one_rank_get_numbers_and_other_ranks_their_own_names(tmp_path):
    draft = replace(STREAMED, role="draft")
    names = [write(report, tmp_path / "new" / "folder").name for report in (STREAMED, STREAMED, draft)]
    assert names == [
        "load-tp1-pp0-ep1-target-1.json",
        "load-tp1-pp0-ep1-target-2.json",
        "load-tp1-pp0-ep1-draft-1.json",
    ]


def test_writers_at_the_same_time_lose_nothing_and_leave_nothing_behind(tmp_path):
    reports = [replace(STREAMED, final_bytes=size) for size in range(40)]
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda report: write(report, tmp_path), reports))
    assert len(set(files)) == 40
    assert {report.final_bytes for report in read_folder(tmp_path)} == set(range(40))
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_write_works_without_hard_links(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError("no hard links on this file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    names = [write(STREAMED, tmp_path).name for _ in range(2)]
    assert names == ["load-tp1-pp0-ep1-target-1.json", "load-tp1-pp0-ep1-target-2.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_folder_is_read_in_order_of_rank_then_of_writing(tmp_path):
    def load(tp, seconds):
        return replace(STREAMED, ranks=Ranks(tp=ParallelRank(tp, 16)), seconds=seconds)

    for tp in (10, 2, 0):
        for seconds in range(11):
            write(load(tp, float(seconds)), tmp_path)
    found = [(report.ranks.tp.rank, report.seconds) for report in read_folder(tmp_path)]
    assert found == [(tp, float(seconds)) for tp in (0, 2, 10) for seconds in range(11)]


def test_folder_may_hold_other_files(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "memory.png").write_bytes(b"\x89PNG")
    write(STREAMED, tmp_path)
    assert read_folder(tmp_path) == (STREAMED,)


def test_tree_has_each_folder_with_reports_and_a_folder_alone_has_its_own(tmp_path):
    for place, seconds in (("b", 1.0), ("a/deep", 2.0), ("a/deep", 3.0), (".", 4.0)):
        write(replace(STREAMED, seconds=seconds), tmp_path / place)
    (tmp_path / "other").mkdir()
    found = {place: [report.seconds for report in loads] for place, loads in read_tree(tmp_path).items()}
    assert found == {tmp_path: [4.0], tmp_path / "a" / "deep": [2.0, 3.0], tmp_path / "b": [1.0]}
    assert list(found) == sorted(found)
    assert [report.seconds for report in read_folder(tmp_path)] == [4.0]


def test_unknown_fields_of_the_same_version_are_ignored():
    data = json.loads(json.dumps(to_json(STREAMED)))
    data["later"] = 1
    data["memory"]["later"] = [2]
    assert from_json(data) == STREAMED


def test_report_from_before_a_field_was_added_is_read():
    data = json.loads(json.dumps(to_json(STREAMED)))
    del data["scheme"], data["missing"], data["node"], data["layers"]["figures"]
    _validator().validate(data)
    assert from_json(data) == replace(STREAMED, missing=(), layers=replace(STREAMED.layers, figures=()))


def _places(data, path=()):
    """Every field of ``data``, as the path to it."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _name(path):
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


DATA = json.loads(json.dumps(to_json(STREAMED)))
FIELDS = [path for path in _places(DATA) if path[0] not in ("schema", "version")]


REQUIRED = [path for path in FIELDS if isinstance(path[-1], str) and path[-1] not in ADDED]


@pytest.mark.parametrize("path", REQUIRED, ids=_name)
def test_missing_field_is_named(path):
    data = copy.deepcopy(DATA)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    with pytest.raises(ReportError, match="missing") as caught:
        from_json(data)
    assert str(caught.value).startswith(f"{_name(path)} is missing")


def _set(data, path, value):
    """A copy of ``data`` with ``value`` at ``path``."""
    changed = copy.deepcopy(data)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def _get(data, path):
    for key in path:
        data = data[key]
    return data


WRONG = [
    (path, wrong)
    for path in FIELDS
    for wrong in (None, True, {"x": 1}, "text", [1], 1.5)
    # Of the right kind: one text for another, one number for another.
    if type(_get(DATA, path)) is not type(wrong) or path[-1] in ("mode", "role") or isinstance(wrong, (dict, list))
]


@pytest.mark.parametrize(("path", "wrong"), WRONG, ids=lambda value: _name(value) if type(value) is tuple else None)
def test_field_of_the_wrong_kind_is_named(path, wrong):
    with pytest.raises(ReportError) as caught:
        from_json(_set(DATA, path, wrong))
    assert _name(path) in str(caught.value)


def test_newer_version_says_which_reader_is_needed(tmp_path):
    file = tmp_path / "load-tp0-pp0-ep0-target-1.json"
    file.write_text(json.dumps({**DATA, "version": 2}))
    with pytest.raises(ReportError, match=r"version 2.*reads version 1.*newer") as caught:
        read_folder(tmp_path)
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, StreamFP8Error)


@pytest.mark.parametrize("text", ["", "{", '{"schema": "sglang-streamfp8/load-report", ', "\x00\x01"])
def test_broken_file_is_named(tmp_path, text):
    file = tmp_path / "load-tp0-pp0-ep0-target-1.json"
    file.write_text(text)
    with pytest.raises(ReportError, match="not JSON") as caught:
        read_folder(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("data", [[], 1, {}, {"schema": "something/else", "version": 1}])
def test_other_json_is_not_taken_for_a_report(data):
    with pytest.raises(ReportError, match="not a load report"):
        from_json(data)


@pytest.mark.parametrize("reading", [read_folder, read_tree])
def test_folder_without_reports_says_how_to_make_some(reading, tmp_path):
    with pytest.raises(ReportError, match="SGLANG_STREAMFP8_REPORT"):
        reading(tmp_path)
    with pytest.raises(ReportError, match="not a folder"):
        reading(tmp_path / "nothing")


def test_unwritable_folder_says_which_variable_to_change(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ReportError, match="SGLANG_STREAMFP8_REPORT"):
        write(STREAMED, tmp_path / "file")


def test_summary_of_a_streamed_load():
    assert summary_line(STREAMED) == (
        "StreamFP8: 1234 units in 210 layers streamed, 2 deferred, 0 fell back; 5.6 s; peak +1.37 GB over start; "
        "model 1.29 GB; staging peak 3.10 MB"
    )


def test_summary_names_a_scheme_that_is_not_stocks():
    line = summary_line(replace(STREAMED, scheme="block"))
    assert line.startswith("StreamFP8: scheme: block; 1234 units")


def test_summary_of_a_stock_load_claims_no_streaming():
    line = summary_line(replace(STREAMED, mode="stock"))
    assert (
        line
        == "StreamFP8: nothing streamed, loaded as stock SGLang does; 5.6 s; peak +1.37 GB over start; model 1.29 GB"
    )
