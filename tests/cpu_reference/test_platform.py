"""What the platform tells SGLang."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import sglang  # noqa: F401 (asks for the platform while it is imported, so it cannot be imported by the platform)
import torch

from sglang_overlay.cpu_reference import platform as module


@pytest.fixture
def platform() -> module.CpuReferencePlatform:
    return module.CpuReferencePlatform()


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND")


def server_args(**given: object) -> SimpleNamespace:
    names = ("attention_backend", "sampling_backend", "max_total_tokens", "max_running_requests", "quantization")
    sizes = dict.fromkeys(("tp_size", "pp_size", "dp_size"), 1)
    defaults = {**dict.fromkeys(names), **sizes, "moe_runner_backend": "auto", "disable_overlap_schedule": False}
    return SimpleNamespace(**{**defaults, **given})


def test_is_out_of_tree_and_not_the_cpu_engine(platform: module.CpuReferencePlatform) -> None:
    assert platform.is_out_of_tree()
    assert not platform.is_cpu()
    assert platform.device_type == "cpu"
    assert platform.get_torch_distributed_backend_str() == "gloo"


def test_free_memory_is_what_the_host_has_available(platform: module.CpuReferencePlatform) -> None:
    total = platform.get_device_total_memory()
    free = total - platform.get_current_memory_usage()
    assert 0 < free < total
    assert platform.get_available_memory()[1] == total


def test_defaults_fill_only_what_the_user_left_open(platform: module.CpuReferencePlatform) -> None:
    args = server_args(max_total_tokens=99)
    platform.apply_server_args_defaults(args)
    assert args.max_total_tokens == 99
    assert args.attention_backend == "torch_native"
    assert args.max_running_requests == module.RUNNING_REQUESTS
    assert args.disable_overlap_schedule


def test_mxfp8_experts_get_a_runner_that_leaves_gate_and_up_in_their_places(
    platform: module.CpuReferencePlatform,
) -> None:
    from sglang.srt import server_args as arguments

    if not hasattr(arguments, "add_mxfp8_moe_runner_backend_choices"):
        pytest.skip("this release takes FlashInfer's runner in any case")
    args = [server_args(quantization="mxfp8"), server_args(quantization="mxfp8", moe_runner_backend="cutlass")]
    args.append(server_args(quantization="fp8"))
    for given in (*args, server_args(quantization="mxfp8")):
        platform.apply_server_args_defaults(given)
    assert [given.moe_runner_backend for given in args] == ["triton", "cutlass", "auto"]
    assert list(arguments.MXFP8_MOE_RUNNER_BACKEND_CHOICES).count("triton") == 1


def test_each_rank_gets_cores(platform: module.CpuReferencePlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})
    platform.apply_server_args_defaults(server_args(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,5"


def test_ranks_share_cores_where_there_are_too_few(
    platform: module.CpuReferencePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    platform.apply_server_args_defaults(server_args(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "3|3"


def test_a_binding_the_user_chose_stays(platform: module.CpuReferencePlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "7")
    platform.apply_server_args_defaults(server_args())
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "7"


def test_a_second_engine_may_have_other_ranks(
    platform: module.CpuReferencePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    platform.apply_server_args_defaults(server_args())
    platform.apply_server_args_defaults(server_args(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"


def test_a_rank_uses_its_share_of_threads(
    platform: module.CpuReferencePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0-2|3-5")
    try:
        platform.init_backend()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
