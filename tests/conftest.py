# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and loads that tests share: both cost seconds, so both are made once a session."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

# Before torch: OpenMP threads that wait for work would otherwise spin, and take the cores from the tests beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from harness.forked_python import ForkedPython
from harness.streamed import load_reported
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadResult, LoadWorkers

from sglang_overlay.hooks import releases
from sglang_overlay.observe.report import LoadReport

# Collections while tests import SGLang take a fifth of the time, and find nothing.
gc.disable()

HARNESS = Path(__file__).parent / "harness"
WORKER_BYTES = 7 << 30
"""What the loads of one test may take: stock's bf16 and fp8 of a 4 GB checkpoint, and the processes around them."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes ``-n auto`` tests with. A file's tests stay together, and files in the order they are in.

    The default order, files with the most tests first, leaves those that take longest for the end.
    """
    config.option.dist = "loadfile"
    config.option.loadscopereorder = False
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().total // WORKER_BYTES))


FULL = (
    "cpu_reference/test_layers.py",
    "cpu_reference/test_plugin.py",
    "hooks/test_built_in.py",
    "hooks/test_option_hooks.py",
    "hooks/test_plugin.py::TestFunctionThatDoesSomethingElse",
    "hooks/test_plugin.py::TestHooksThatCannotBeApplied",
    "hooks/test_plugin.py::TestMetricsOfSGLang",
    "hooks/test_plugin.py::TestReleaseThatIsNotSupported",
    "hooks/test_plugin.py::test_private_names_of_sglangs_own_hook_registry_are_not_needed",
    "load/test_fuzz.py",
    "load/test_load_formats.py",
    "load/test_memory.py",
    "load/test_mxfp8.py",
    "load/test_presharded.py",
    "load/test_server.py",
    "offline/export/test_export.py",
    "offline/plan/test_baselines.py",
    "offline/plan/test_from_config.py",
    "offline/plan/test_host.py",
    "offline/plan/test_plan.py",
    "offline/plan/test_serving.py",
    "offline/plan/test_simulate.py",
    "standin/test_backends.py",
    "standin/test_costs.py",
    "standin/test_rearranged.py",
    "standin/test_rocm.py",
    "standin/test_sleep.py",
    "test_packaging.py::test_wheel_installs_and_its_command_runs",
    "test_quantizing.py",
    "test_readme.py::test_light_command_runs",
    "update/test_dummy_start.py",
    "update/test_update_live.py",
    "update/test_update_ranks.py",
    "update/test_update_rule.py::test_two_ranks_hold_what_they_answer",
    "update/test_updates.py::test_update_needs_memory_for_what_it_replaces_and_for_units",
    "workbench/test_bench.py",
    "workbench/test_demo.py",
    "workbench/test_gpu_check.py",
    "workbench/test_layer_granular.py",
    "workbench/test_make_patches.py",
    "workbench/test_quality.py",
    "workbench/test_update_bench.py",
    "workbench/test_watch.py::test_function_that_takes_something_else_or_more_is_reported_by_name",
)
"""Tests that only ``ci/test --full`` runs, by what their names begin with: servers, processes, measurements, and what
shorter tests hold for another release, GPU or loader."""

NIGHTLY = (
    "cpu_reference/test_plugin.py::test_server_that_has_lost_its_accelerator_fails_as_stock_does[0",
    "hooks/test_built_in.py::test_required_load_is_the_overlays_and_stocks_to_the_bit[deepseek_v3",
    "hooks/test_launch.py",
    "hooks/test_option_hooks.py::test_server_and_engine_take_the_flag",
    "hooks/test_ray_actors.py",
    "load/test_fuzz.py::test_damaged_checkpoint_loads_as_stock_or_is_a_clear_error[deepseek_v3",
    "load/test_mxfp8.py::test_peak_is",
    "load/test_nodes.py",
    "load/test_signals.py",
    "load/test_soak.py",
    "offline/plan/test_baselines.py::test_a_held_bf16_reference_is_caught",
    "offline/plan/test_baselines.py::test_layer_sized_staging_is_caught",
    "offline/plan/test_baselines.py::test_the_same_code_gives_the_same_figures",
    "offline/plan/test_baselines.py::test_what_is_planned_now_is_what_the_baseline_says[DeepSeek-V2-Lite",
    "offline/plan/test_simulate.py::test_an_update_is_planned_to_launch_no_more_than_a_load_and_to_await_what_it_keeps"
    "[deepseek_v3",
    "offline/plan/test_simulate.py::test_backend_that_only_a_chosen_scheme_can_have_is_planned",
    "offline/plan/test_simulate.py::test_planned_peaks_are_within_two_percent_of_measured_ones",
    "standin/test_backends.py::test_an_update_leaves_what_a_fresh_load_leaves_in_the_same_memory[a100",
    "standin/test_backends.py::test_an_update_leaves_what_a_fresh_load_leaves_in_the_same_memory"
    "[b200 qwen3_moe-deep_gemm",
    "standin/test_costs.py::test_the_peak_of_an_update_is_a_bucket_and_two_units_of_each_thread",
    "standin/test_rocm.py::test_an_update_leaves_what_a_fresh_load_leaves[mi300x-deepseek_v3",
    "standin/test_rocm.py::test_an_update_leaves_what_a_fresh_load_leaves[mi300x-per-token-deepseek_v3",
    "standin/test_rocm.py::test_an_update_leaves_what_a_fresh_load_leaves[mi355x-aiter-deepseek_v3",
    "standin/test_rocm.py::test_streaming_leaves_what_stock_leaves[mi300x-per-token-deepseek_v3",
    "standin/test_rocm.py::test_streaming_leaves_what_stock_leaves[mi355x-aiter-deepseek_v3",
    "test_container.py::test_dockerfiles_step_installs_the_package_where_sglang_streams_with_it",
    "update/test_clients.py",
    "update/test_lora.py",
    "update/test_replicas.py",
    "update/test_update_live.py::TestRequestsMeanwhile::test_those_that_are_aborted_end_with_old_weights[disk",
    "update/test_update_live.py::TestRequestsMeanwhile::test_those_that_are_paused_in_place_go_on[tensors",
    "update/test_update_live.py::TestRequestsMeanwhile::test_those_that_are_retracted_go_on_with_the_new_weights_alone"
    "[disk",
    "update/test_update_live.py::TestRequestsMeanwhile::test_update_waits_for_them[tensors",
    "update/test_update_serving.py",
    "workbench/test_demo.py::test_command_serves_a_checkpoint_both_ways",
    "workbench/test_fork.py::test_series_is_rebased",
    "workbench/test_gpu_check.py::test_rehearsal_runs_steps_one_after_another",
    "workbench/test_make_patches.py::test_sglang_with_the_first_patches_imports_and_passes_their_tests",
    "workbench/test_quality.py::test_served_losses",
    "workbench/test_remote.py",
    "workbench/test_restart_bench.py::test_second_start",
)
"""Tests that run every night alone, by what their names begin with: each shows at length, with another process, family
or signal, what another test of CI shows."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark those of ``FULL`` and ``NIGHTLY``."""
    for item in items:
        for marker, names in (("full", FULL), ("nightly", NIGHTLY)):
            if item.nodeid.removeprefix("tests/").startswith(names):
                item.add_marker(marker)


def pytest_collection_finish() -> None:
    """All is imported."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of what the installed SGLang is known not to have."""
    for (target,) in (marker.args for marker in item.iter_markers("needs")):
        if target in releases.absent():
            pytest.skip(f"SGLang {releases.installed()} has no {target}")


Both = tuple[LoadResult, LoadResult, Sequence[LoadReport]]


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are kept; ``STREAMFP8_CHECKPOINTS`` keeps them from one session to the next."""
    kept = os.environ.get("STREAMFP8_CHECKPOINTS")
    if kept:
        return Path(kept)
    base = tmp_path_factory.getbasetemp()
    # Processes that test at the same time have folders in one that they share.
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"


@pytest.fixture(scope="session")
def checkpoint(checkpoint_folder: Path) -> Callable[..., Path]:
    """``checkpoint("qwen3_moe", files=4, ...)`` builds that checkpoint and returns its folder."""
    return lambda family, **fields: build(CheckpointSpec(family, **fields), checkpoint_folder)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadWorkers]:
    """Processes that load models in real SGLang, one group for each TP size."""
    with LoadWorkers(tmp_path_factory.mktemp("loads")) as group:
        yield group


@pytest.fixture
def both(workers: LoadWorkers, tmp_path: Path) -> Callable[..., Both]:
    """Stock and streaming loads of the same checkpoint in the same way, and the streaming load's reports."""

    def load(path: Path, streaming: str = "require", workers: LoadWorkers = workers, **fields: Any) -> Both:
        job = LoadJob(path, streaming=streaming, **fields)
        stock = workers.load(replace(job, streaming="0"))
        return stock, *load_reported(workers.load, job, tmp_path / "reports")

    return load


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedPython]:
    """Runs programs that import SGLang."""
    with ForkedPython(tmp_path_factory.mktemp("python")) as python:
        yield python


@pytest.fixture(scope="session", autouse=True)
def hub(tmp_path_factory):
    """The cache of models from the hub that processes of tests have, and no hub: puts a checkpoint there, and returns
    its name. Set before the first process starts, since huggingface_hub reads the variables when it is imported."""
    folder = tmp_path_factory.mktemp("hub")

    def add(checkpoint, name):
        repository = folder / f"models--tiny--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abcd")
        return Path("tiny", name), shutil.copytree(checkpoint, repository / "snapshots" / "0123abcd")

    add.folder = folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield add


@pytest.fixture(scope="session")
def odd_workers(tmp_path_factory):
    """Workers that know the models of ``misbehaving``."""
    with pytest.MonkeyPatch.context() as patch:
        # A process gets its parent's sys.path.
        patch.syspath_prepend(str(HARNESS))
        environ = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "misbehaving"}
        with LoadWorkers(tmp_path_factory.mktemp("odd"), environ) as group:
            yield group
