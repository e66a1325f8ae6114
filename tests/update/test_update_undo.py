# SPDX-License-Identifier: Apache-2.0
"""What updates rest on: what was overwritten comes back, and values and scales wait for each other."""

from __future__ import annotations

import pytest
import torch
from core import streams
from core.test_whole_rows import Split, weight_of

from sglang_overlay.core.errors import ConflictingWriteError
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.errors import WeightUpdateError
from sglang_overlay.update.ready_values import ReadyValues
from sglang_overlay.update.tensor_groups import TensorGroups
from sglang_overlay.update.undo import UndoableQuantizer, UndoLog
from sglang_overlay.update.update_capture import GivenTensors, ServedMemory, UpdateCapture, storage_key
from sglang_overlay.update.update_sources import UpdateSources
from sglang_overlay.update.update_stream import UpdateStream


def write(undo, view, value):
    undo.keep(view)
    view.fill_(value)


def test_overlapping_writes_of_several_calls_are_undone_in_order():
    undo, weight = UndoLog(), torch.arange(6.0)
    write(undo, weight[:4], 10)
    undo.begin_call()
    write(undo, weight[2:], 20)
    write(undo, weight[:4], 30)
    after_first = torch.tensor([10.0, 10, 10, 10, 4, 5])
    undo.undo_call()
    assert torch.equal(weight, after_first)
    undo.begin_call()
    write(undo, weight[1:5], 40)
    undo.keep_call()
    undo.undo()
    assert torch.equal(weight, torch.arange(6.0))


def test_region_that_is_written_again_and_again_is_kept_once():
    undo, weight = UndoLog(), torch.zeros(4)
    for value in range(3):
        undo.begin_call()
        write(undo, weight, value)
        undo.keep_call()
    assert [len(call) for call in undo._calls] == [1]


@pytest.fixture
def ready():
    """Values and scales of four rows on their way; placeholders for both, and what is served."""
    storage = Storage(torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(4))
    values, scales = torch.empty(4, 8, device="meta"), torch.empty(4, 1, device="meta")
    made = ReadyValues(
        "proj.weight", UnitGrid.per_slice((4, 8)), storage, scales, "proj.scale", UndoLog(), StagingAccount()
    )
    return made, values, scales, storage


def test_rows_are_replaced_once_they_have_values_and_scales_in_any_order(ready):
    made, values, scales, storage = ready
    new = torch.arange(32.0).view(4, 8).to(torch.float8_e4m3fn)
    made.write_values(values[:2], new[:2])
    made.write(scales[1:], torch.full((3, 1), 2.0))
    assert made.taken.tolist() == [False] * 4
    assert (
        made.problem == "proj.weight (4 of 4 units: float8_e4m3fn values without their scales in scale, or the reverse)"
    )
    made.write(scales[:1], torch.full((1, 1), 3.0))
    assert made.taken.tolist() == [True, True, False, False]
    made.write_values(values[2:, 4:], new[2:, 4:])
    made.write_values(values[2:, :4], new[2:, :4])
    assert made.problem is None
    assert torch.equal(storage.weight.float(), new.float())
    assert storage.scale.tolist() == [3.0, 2.0, 2.0, 2.0]


def test_values_that_come_again_want_their_scales_again(ready):
    made, values, scales, storage = ready
    for value in (1.0, 2.0):
        made.write_values(values, torch.full((4, 8), value).to(torch.float8_e4m3fn))
        made.write(scales, torch.full((4, 1), value))
    assert storage.scale.tolist() == [2.0] * 4
    made.write_values(values, torch.ones(4, 8).to(torch.float8_e4m3fn))
    assert made.problem is not None


def test_what_waits_comes_back_with_what_was_saved(ready):
    made, values, scales, storage = ready
    made.write_values(values, torch.ones(4, 8).to(torch.float8_e4m3fn))
    saved = made.saved()
    made.write(scales, torch.full((4, 1), 5.0))
    made.restore(saved)
    assert made.taken.tolist() == [False] * 4
    made.write(scales, torch.full((4, 1), 7.0))
    assert storage.scale.tolist() == [7.0] * 4


def test_group_that_a_failed_call_completed_waits_again():
    fused, q, kv = (
        "layers.0.fused_qkv_a_proj_with_mqa",
        "layers.0.q_a_proj.weight",
        "layers.0.kv_a_proj_with_mqa.weight",
    )
    account = StagingAccount()
    groups = TensorGroups([fused], account)
    list(groups.complete([(q, torch.ones(2))]))
    saved = groups.saved()
    list(groups.complete([(kv, torch.ones(2))]))
    groups.restore(saved)
    assert account.held == 8
    assert [name for name, _ in groups.complete([(kv, torch.ones(2))])] == [q, kv]


@pytest.fixture
def capture():
    """A capture of a model's two tensors, one of which is quantized; these, and what upstream was given."""
    quantized, plain = torch.zeros(4).to(torch.float8_e4m3fn), torch.zeros(4)
    given, undo = GivenTensors(), UndoLog()
    served = ServedMemory({storage_key(quantized): "proj.weight"}, {storage_key(plain): "norm.weight"}, undo)
    return UpdateCapture({}, {}, served, given), quantized, plain, given, undo


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.copy_(torch.ones(4)),
        lambda weight: weight.view(2, 2)[1].fill_(1),
        lambda weight: weight.view(torch.uint8).add_(1),
        lambda weight: weight.view(torch.int8).index_put_((torch.tensor([1]),), torch.tensor([1], dtype=torch.int8)),
        lambda weight: weight.view(torch.uint8).zero_(),
    ],
)
def test_nothing_is_written_into_quantized_memory_whatever_way_leads_there(change, capture):
    mode, quantized, *_ = capture
    with mode, pytest.raises(WeightUpdateError, match=r"proj\.weight holds quantized values"):
        change(quantized)
    assert not quantized.float().any()


def test_other_memory_is_kept_before_it_is_written_to(capture):
    mode, _, plain, _, undo = capture
    with mode:
        plain[1:].add_(1)
        plain.mul_(3)
    undo.undo()
    assert not plain.any()


def test_values_without_scale_are_never_converted(capture):
    mode, _, plain, given, _ = capture
    sent = torch.ones(4).to(torch.float8_e4m3fn)
    given.offer("norm.weight", sent)
    for convert in (lambda: plain.copy_(sent), lambda: sent.to(torch.bfloat16), lambda: sent[1:].float()):
        with mode, pytest.raises(WeightUpdateError, match=r"norm\.weight holds float8_e4m3fn values"):
            convert()


def test_tensors_that_nothing_was_done_with_are_known_by_name_in_a_bucket_too(capture):
    mode, _, plain, given, _ = capture
    parts = torch.ones(12).split(4)
    for number, part in enumerate(parts):
        given.offer(f"part{number}", part)
    with mode:
        plain.copy_(parts[1].view(2, 2).t().reshape(4))
    assert given.unused == ["part0", "part2"]


def test_call_that_is_undone_leaves_the_whole_rows_of_what_waits():
    split = Split.of((12, 64), 12, kind=UpdateStream, sources=UpdateSources, ready=None, under_way=lambda: None)
    weight = weight_of(12, 64)

    def load(values, rows):
        split.load(values[rows], lambda param, given: param.data[rows].copy_(split.narrow(given)))

    load(weight, slice(0, 6))
    saved = split.stream.saved()
    load(weight * 50, slice(0, 8))
    split.stream.restore_call(saved)
    load(weight, slice(6, 12))
    assert (split.stream.incomplete, split.stream.mixed) == (None, None)
    assert split.equals(weight)


@pytest.fixture
def served():
    """A parameter of one unit that is being updated: its stream, and where upstream writes."""
    grid, placeholder = UnitGrid(1, (4, 8), sliced=True), streams.make_parameter(torch.empty(1, 4, 8, device="meta"))
    storage = Storage(torch.zeros(1, 4, 8).to(streams.FP8), torch.ones(1))
    stream = UpdateStream(
        "layer.weight", placeholder, grid, streams.one_scale(), storage, StagingAccount(), UpdateSources(), ready=None,
        under_way=lambda: None, rows=None, executor=Executor(),
    )  # fmt: skip
    return streams.Streamed(stream, placeholder, stream._account, stream.sources)


def test_lent_memory_is_copied_only_if_it_is_taken_back_before_its_unit_is_complete(served):
    values = torch.randn(1, 4, 8)
    first, rest = values[:, :2].clone(), values[:, 2:].clone()
    with served.capture():
        served.sources.lend(first)
        served.placeholder.data[:, :2].copy_(first)
        assert served.account.peak == 0
        served.stream.copy_lent()
        served.sources.take_back()
        assert served.account.held == first.nbytes
        first.fill_(7)
        served.placeholder.data[:, 2:].copy_(rest)
    assert served.account.held == 0
    assert served.equals(values)


def test_lent_memory_that_is_changed_before_its_unit_is_complete_is_an_error(served):
    first, rest = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    with served.capture():
        served.sources.lend(first)
        served.placeholder.data[:, :2].copy_(first)
        first.fill_(7)
        with pytest.raises(ConflictingWriteError):
            served.placeholder.data[:, 2:].copy_(rest)


def test_scales_are_kept_once_and_together():
    undo, scales = UndoLog(), torch.ones(3, 4)
    quantizer = UndoableQuantizer(streams.one_scale_a_row(4), scales, undo)
    weight = torch.zeros(3, 4, 8).to(streams.FP8)
    for unit in range(3):
        quantizer.quantize_run(torch.randn(1, 4, 8), weight[unit : unit + 1], scales[unit : unit + 1])
        assert undo.bytes == weight[: unit + 1].nbytes + scales.nbytes
    undo.undo()
    assert torch.equal(scales, torch.ones(3, 4))
    assert not weight.float().any()


def test_what_is_kept_has_the_form_of_what_it_was():
    """Copies share large pieces of memory, whatever their sizes, and in inference mode too."""
    undo = UndoLog()
    weights = [
        torch.arange(3.0),
        torch.tensor(5.0),
        torch.arange(12).view(3, 4).t().to(torch.float8_e4m3fn),
        torch.arange(9 << 20, dtype=torch.int8),
    ]
    before = [weight.clone() for weight in weights]
    for number, weight in enumerate(weights):
        with torch.inference_mode(mode=bool(number % 2)):
            undo.keep(weight)
        weight.zero_()
    undo.undo()
    assert all(torch.equal(weight.float(), old.float()) for weight, old in zip(weights, before, strict=True))
