from dataclasses import replace

import pytest
from reports import STREAMED_LOAD

from sglang_overlay.observe.differences import differences
from sglang_overlay.observe.report import LayerCounts, LayerNote, ParallelRank, Ranks

FALLEN = LayerCounts(fallback=(LayerNote("a", "odd"), LayerNote("b", "odd")))


def load(tp=0, size=2, **fields):
    return replace(STREAMED_LOAD, ranks=Ranks(tp=ParallelRank(tp, size)), **fields)


def fleet(*pods):
    """What differs between pods, each given by its loads."""
    placed = [(one, f"fleet/pod-{index}") for index, pod in enumerate(pods) for one in pod]
    return differences([one for one, _ in placed], [folder for _, folder in placed])


def pod(size=2, **fields):
    return [load(tp, size, **fields) for tp in range(size)]


def heavier(one, factor):
    memory = one.memory
    return replace(one, memory=replace(memory, peak_above_start=int(memory.peak_above_start * factor)))


def test_equal_loads_differ_in_nothing_and_so_does_a_single_one():
    assert fleet(pod(), pod(), pod()) == []
    assert fleet([load(0, 1)]) == []


def test_slowest_and_highest_are_named_beside_the_median():
    slow, high = replace(load(1), seconds=20.0), heavier(load(1), 2)
    assert fleet(pod(), [load(0), slow], [load(0), high]) == [
        "highest peak: pod-2 TP1/2, +2.75 GB, 2.20x its model; median 1.10x",
        "slowest: pod-1 TP1/2, 20.0 s; median 6.0 s",
    ]


def test_small_variation_is_not_told():
    assert fleet(pod(), [load(0), heavier(replace(load(1), seconds=6.5), 1.09)]) == []


def test_peak_is_judged_by_each_ranks_own_model():
    stage = replace(heavier(load(1), 0.5), final_bytes=STREAMED_LOAD.final_bytes // 2)
    assert fleet([load(0), stage]) == []


def test_loads_that_fell_back_lack_weights_or_warned_are_told_from_those_that_did_not():
    bad = [load(0), load(1, layers=FALLEN, missing=("x",), warnings=("one", "two"))]
    assert fleet(pod(), bad) == [
        "fell back: 2 layers on pod-1 TP1/2; none on 3 others",
        "not completely written: 1 parameter on pod-1 TP1/2; none on 3 others",
        "warned: 2 warnings on pod-1 TP1/2; none on 3 others",
    ]
    assert fleet(pod(layers=FALLEN), pod(layers=FALLEN)) == []


def test_replica_that_loaded_as_stock_is_named_as_a_whole():
    assert fleet(pod(), pod(mode="stock"))[0] == "loaded as stock: pod-1 (all 2); 2 of 4 streamed"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("scheme", "block", "scheme: block on pod-1 (all 2); stock on 4 others"),
        ("release", "0.5.22", "SGLang: 0.5.22 on pod-1 (all 2); 0.5.23 on 4 others"),
        ("overlay_version", "0.2.0", "sglang-streamfp8: 0.2.0 on pod-1 (all 2); 0.1.0 on 4 others"),
        ("load_format", "pt", "load format: pt on pod-1 (all 2); auto on 4 others"),
    ],
)
def test_setting_of_fewer_loads_comes_first(field, value, told):
    assert fleet(pod(), pod(**{field: value}), pod()) == [told]


def test_replicas_of_other_sizes_are_told_and_each_is_complete():
    assert fleet(pod(), pod(4)) == ["tensor parallel size: 2 on pod-0 (all 2); 4 on 4 others"]


def test_rank_without_a_report_is_named_with_its_replica():
    assert fleet(pod(3), pod(3)[:2]) == ["no report in pod-1: TP2/3"]


def test_rank_that_wrote_fewer_reports_than_others_of_its_server_is_named():
    assert fleet([*pod(), load(1)]) == ["no report: TP0/2 (1 of 2)"]


def test_nodes_of_one_server_with_a_folder_each_lack_nothing():
    assert fleet([load(0)], [load(1)]) == []
    assert fleet([load(0, 3)], [load(1, 3)]) == ["no report: TP2/3"]


def test_stages_are_ranks_too():
    def stage(pp):
        return replace(load(0, 1), ranks=Ranks(pp=ParallelRank(pp, 2)))

    assert fleet([stage(0), stage(1)], [stage(0)]) == ["no report in pod-1: TP0/1 PP1/2"]


def test_models_and_drafts_are_compared_with_their_own_kind():
    draft = {"role": "draft", "model_path": "models/eagle", "seconds": 1.0}
    assert fleet(pod() + pod(**draft), pod() + pod(**draft)) == []
    assert fleet(pod() + pod(**draft), pod() + pod(**{**draft, "seconds": 2.0})) == [
        "eagle, draft: slowest: pod-1 eagle TP0/2 draft, 2.0 s; median 1.5 s"
    ]


def test_same_model_is_one_wherever_it_is_mounted():
    assert fleet(pod(), pod(model_path="/mnt/other/moe-1b")) == []


def test_many_names_are_counted():
    found = fleet(*([load(0), load(1, scheme="block")] for _ in range(9)), pod())
    assert found == [
        "scheme: block on pod-0 TP1/2, pod-1 TP1/2, pod-2 TP1/2, pod-3 TP1/2 and 5 more; stock on 11 others"
    ]
