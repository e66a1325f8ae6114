# SPDX-License-Identifier: Apache-2.0
"""Tensors without memory behave as the code that loads models needs them to, and are counted."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.core.placeholders import materialize
from sglang_overlay.offline.plan.account import CUDA_BLOCK, AllocatedLate, AllocatedMemory, TouchedMemory
from sglang_overlay.offline.plan.weightless import EmptyFile, weightless

GPU = torch.device("cuda", 0)
SHAPE = (1024, 1024)
SIZE = 2 * 1024 * 1024


@pytest.fixture
def account():
    counted = AllocatedMemory("cuda", CUDA_BLOCK)
    with weightless(counted):
        yield counted


class OwnParameter(torch.nn.Parameter):
    """As SGLang's parameters: attributes of its own, made from data."""

    def __new__(cls, data, **kwargs):
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data, loader):
        self.loader = loader


def weight(device=GPU):
    return torch.empty(SHAPE, dtype=torch.bfloat16, device=device)


def test_tensors_whose_contents_are_unknown_are_equal(account):
    assert torch.equal(weight(), weight())
    assert torch.equal(*(EmptyFile(SIZE).tensor(SHAPE, torch.bfloat16) for _ in range(2)))


def test_a_tensor_on_a_gpu_that_is_not_there_is_counted_while_it_lives(account):
    tensor = weight()
    assert tensor.device == GPU
    assert account.held == SIZE
    del tensor
    assert (account.held, account.peak) == (0, SIZE)


def test_views_share_memory_and_results_do_not(account):
    tensor = weight()
    view = tensor.narrow(0, 3, 5).t()
    assert account.held == SIZE
    result = tensor.float()
    del tensor
    assert account.held == SIZE + 2 * SIZE
    del view, result
    assert account.held == 0


def test_small_allocations_take_a_block(account):
    scale = torch.zeros(3, device=GPU)
    assert account.held == CUDA_BLOCK
    del scale


def test_memory_on_the_host_is_not_the_gpus(account):
    host = torch.empty(SHAPE)
    assert host.device.type == "cpu"
    assert account.peak == 0


def test_a_copy_between_devices_into_a_strided_view_goes_through_contiguous_memory(account):
    tensor, source = weight(), torch.zeros(1024, 512, dtype=torch.bfloat16)
    tensor[:512].copy_(source.view(512, 1024))
    assert account.peak == SIZE
    tensor[:, :512].copy_(source)
    assert account.peak == SIZE + SIZE // 2


def test_a_copy_that_does_not_fit_is_an_error(account):
    with pytest.raises(RuntimeError):
        weight().copy_(torch.zeros(1023, 1024))


def test_a_parameter_class_keeps_its_attributes(account):
    parameter = OwnParameter(data=weight(), loader="mine")
    assert isinstance(parameter, OwnParameter)
    assert isinstance(parameter, torch.nn.Parameter)
    assert (parameter.loader, parameter.shape, parameter.device) == ("mine", SHAPE, GPU)


def test_a_placeholder_becomes_a_parameter_and_a_placeholder_again(account):
    placeholder = OwnParameter(data=weight("meta"), loader="mine")
    assert account.held == 0
    undo = materialize(placeholder, weight())
    assert (placeholder.device, placeholder.loader, account.held) == (GPU, "mine", SIZE)
    assert placeholder.float().device == GPU
    torch.utils.swap_tensors(placeholder, undo)
    del undo
    assert (placeholder.is_meta, placeholder.loader, account.held) == (True, "mine", 0)


def test_small_tensors_on_the_host_have_contents(account):
    assert torch.arange(5).tolist() == [0, 1, 2, 3, 4]


def test_a_single_number_on_the_gpu_keeps_its_value(account):
    scale = torch.nn.Parameter(torch.tensor(-1.0, device=GPU), requires_grad=False)
    assert float(scale) == -1.0
    assert bool(scale <= 0.0)
    scale.copy_(2.0)
    assert float(scale * 2) == 4.0


def test_an_unknown_number_is_zero_and_a_search_finds_nothing(account):
    assert float(weight().amax()) == 0.0
    assert (~torch.isfinite(weight())).nonzero().tolist() == []


def test_tensors_of_the_checkpoint_are_viewed_and_cost_nothing():
    account = TouchedMemory("cpu")
    source = EmptyFile(SIZE).tensor(SHAPE, torch.bfloat16)
    with weightless(account):
        parameter = weight("cpu")
        assert account.held == 0
        parameter.narrow(0, 0, 512).copy_(source.narrow(0, 512, 512))
    assert account.peak == SIZE // 2


def test_on_the_cpu_memory_counts_when_it_is_written_to():
    account = TouchedMemory("cpu")
    with weightless(account):
        tensor, zeros = weight("cpu"), torch.zeros(SHAPE)
        assert account.held == zeros.nbytes
        tensor[:256].zero_()
        assert account.held == zeros.nbytes + SIZE // 4
        tensor.view(-1)[torch.arange(8)] = 1.0
        assert account.held == zeros.nbytes + SIZE // 4 + 16
        for _ in range(8):
            tensor.zero_()
        assert account.held == zeros.nbytes + SIZE


def test_quantized_memory_may_count_when_it_is_filled():
    account = AllocatedLate("cuda")
    with weightless(account):
        layer = weight()
        quantized = torch.empty(SHAPE, dtype=torch.float8_e4m3fn, device=GPU)
        assert account.held == SIZE
        quantized[:512].copy_(layer[:512])
        assert account.held == SIZE + SIZE // 4


def test_the_timeline_has_the_highest_and_the_last_figure_of_each_step(account):
    first = weight()
    account.read(10)
    account.pulse(SIZE)
    second = weight()
    account.finish()
    assert account.samples == [(0, 0), (0, SIZE), (10, 2 * SIZE)]
    del first, second
