# SPDX-License-Identifier: Apache-2.0
"""A planned load is the load that would have been."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from workbench.bench.costs import TASK
from workbench.bench.measured import MODELS
from workbench.bench.measured import _workers as measuring_workers
from workbench.loads.job import LoadJob
from workbench.quality import families

from sglang_overlay.observe.report import read_folder
from sglang_overlay.offline.plan.job import MODES, WHOLE_LAYERS, Job, Layout
from sglang_overlay.offline.plan.process import PlanError, Planners
from sglang_overlay.schemes.choice import parse
from sglang_overlay.settings import REPORT_VARIABLE, SCHEME_VARIABLE

MANY = {"files": 7, "assignment": "round_robin"}


@pytest.fixture
def reports(workers, tmp_path):
    def load(path, environ=(), **fields):
        folder = tmp_path / "reports"
        environ = {**dict(environ), REPORT_VARIABLE: str(folder)}
        workers.load(LoadJob(path, streaming="require", environ=environ, **fields))
        return read_folder(folder)

    return load


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_units_layers_and_size_are_those_of_a_real_load(family, checkpoint, reports, simulated):
    path = checkpoint(family, **MANY)
    (real,) = reports(path)
    found = simulated(Job(path, device="cpu"))
    assert (found.units, found.direct_units) == (real.units.streamed, real.units.direct)
    assert (found.streamed, found.deferred) == (real.layers.streamed, len(real.layers.deferred))
    assert found.final == real.final_bytes


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_update_is_planned_to_launch_no_more_than_a_load_and_to_await_what_it_keeps(family, checkpoint, reports):
    path = checkpoint(family, **MANY)
    (real,) = reports(path)
    with Planners(1, TASK) as planners:
        ((load, update),) = planners.run([Job(path)])
    assert update.launches <= load.launches
    assert update.uploads <= load.uploads
    # One for each unit, each parameter's scales, and each tensor that stays in bf16.
    assert real.units.streamed < update.waits <= load.waits + real.units.streamed + update.uploads


def test_experts_without_a_gate_are_planned_without_one(checkpoint_folder, reports, simulated):
    path, scheme = families.build("NemotronHForCausalLM", checkpoint_folder), '{"moe": "channel"}'
    (real,) = reports(path, {SCHEME_VARIABLE: scheme})
    stock, found = simulated(Job(path, device="cpu")), simulated(Job(path, schemes=parse(scheme, ""), device="cpu"))
    assert found.final == real.final_bytes
    # Scales of 4 experts' 96 and 128 rows, in place of one each.
    assert found.final - stock.final == 4 * 4 * (96 + 128 - 2)


@pytest.mark.parametrize(("scheme", "split"), [("channel", 1 + 8), ('{"moe": "int8"}', 8)])
def test_scales_of_rows_that_ranks_share_are_planned(scheme, split, checkpoint, reports, simulated):
    path, layout = checkpoint("qwen3_moe", **MANY), Layout(tp=2)
    real = reports(path, {SCHEME_VARIABLE: scheme}, tp_size=2)
    for rank in range(2):
        job = Job(path, layout, rank, schemes=parse(scheme, ""), device="cpu")
        found, on_device = simulated(job), simulated(replace(job, device="cuda"))
        assert found.final == real[rank].final_bytes
        assert found.units == real[rank].units.streamed
        # Magnitudes of the rows of o_proj, and of each of 8 experts' w2, in each of 3 layers.
        one = simulated(replace(job, layout=Layout(), rank=0, device="cuda"))
        assert on_device.work.uploads - one.work.uploads == 3 * split


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, ep=2), Layout(pp=2)])
def test_each_rank_is_the_real_one(layout, checkpoint, reports, simulated):
    path = checkpoint("qwen3_moe", **MANY)
    real = reports(path, tp_size=layout.tp, ep_size=layout.ep, pp_size=layout.pp)
    found = [simulated(Job(path, layout, rank, device="cpu")) for rank in range(layout.ranks)]
    assert [load.final for load in found] == [load.final_bytes for load in real]
    assert [load.units for load in found] == [load.units.streamed for load in real]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, checkpoint_folder):
    """The ranks' reports of a load in a process that has made the same load before, as of ``workbench.bench.measured``.

    One process a rank for all models: importing SGLang takes longer than a load.
    """
    with measuring_workers(tmp_path_factory.mktemp("measured")) as workers:

        def load(model, mode, again=False):
            job = model.loaded(mode, checkpoint_folder)
            if not again:
                workers.load(job)
            folder = tmp_path_factory.mktemp("reports")
            workers.load(replace(job, environ={REPORT_VARIABLE: str(folder)}))
            return read_folder(folder)

        yield load


@pytest.mark.memory
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_planned_peaks_are_within_two_percent_of_measured_ones(model, checkpoint_folder, simulated, measured):
    for mode in model.modes:
        found = simulated(model.planned(mode, checkpoint_folder))
        reports = measured(model, mode)
        if peak_of(reports) > 1.02 * found.peak:
            # A busy machine can only raise a peak.
            reports = min(reports, measured(model, mode, again=True), key=peak_of)
        assert len(reports) == model.tp
        assert [real.final_bytes for real in reports] == pytest.approx([found.final] * model.tp, rel=1e-4), mode
        assert found.peak == pytest.approx(peak_of(reports), rel=0.02), mode


def peak_of(reports):
    """The highest of equal ranks: a peak between two samples is not seen on each of them."""
    return max(real.memory.peak_above_start for real in reports)


@pytest.fixture
def larger(checkpoint):
    """Large enough that weights, not tables, make the peak; small enough to plan in a second."""
    overrides = (("hidden_size", 512), ("moe_intermediate_size", 512), ("num_experts", 32))
    return checkpoint("qwen3_moe", overrides=overrides, files=4)


def test_streaming_needs_less_than_whole_layers_and_these_less_than_stock(larger, simulated):
    stock, layers, complete, streaming = (simulated(Job(larger, mode=mode, order="shuffled")) for mode in MODES)
    assert stock.peak > 2 * stock.final
    assert stock.peak > layers.peak > complete.peak > streaming.peak
    assert streaming.peak < 1.1 * streaming.final
    assert stock.final == layers.final == complete.final == streaming.final


@pytest.mark.parametrize("mode", [*WHOLE_LAYERS, "streaming"])
def test_units_that_are_counted_again_take_what_computed_ones_take(mode, larger, simulated):
    job = Job(larger, mode=mode)
    with Planners(1, "harness.regressions:every_unit_computed") as planners:
        (computed,) = planners.run([job])
    assert simulated(job) == computed


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("mode", WHOLE_LAYERS)
def test_whole_layers_need_at_least_the_model_that_they_end_with(mode, family, checkpoint, simulated):
    found = simulated(Job(checkpoint(family), mode=mode))
    assert found.peak >= found.final


def test_the_same_job_gives_the_same_plan(larger, planners):
    first, second = planners.run([Job(larger, order="shuffled")] * 2)
    assert first == second


def test_layers_wait_longer_where_files_are_shuffled(checkpoint, simulated):
    path = checkpoint("qwen3_moe", files=12)
    ordered, shuffled = (simulated(Job(path, mode="layers", order=order)) for order in ("sorted", "shuffled"))
    assert shuffled.staging_peak > ordered.staging_peak


def test_layers_that_are_made_when_complete_wait_on_the_host(checkpoint, simulated):
    path = checkpoint("qwen3_moe", files=12)
    ordered, shuffled = (simulated(Job(path, mode="complete_layers", order=order)) for order in ("sorted", "shuffled"))
    assert shuffled.staging_peak == ordered.staging_peak
    assert shuffled.host.held > 2 * ordered.host.held


def test_a_config_alone_gives_the_plan_of_its_checkpoint(checkpoint, simulated):
    path = checkpoint("deepseek_v3")
    headers, config = simulated(Job(path)), simulated(Job(path / "config.json"))
    assert "headers" in headers.checkpoint_source
    assert "config.json" in config.checkpoint_source
    assert (config.final, config.units) == (headers.final, headers.units)
    assert config.checkpoint_parameters == headers.checkpoint_parameters


def test_weights_are_not_read(checkpoint, simulated, tmp_path):
    path = checkpoint("qwen3_moe")
    hollow = shutil.copytree(path, tmp_path / "hollow")
    for file in hollow.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        with file.open("r+b") as opened:
            opened.truncate(8 + header)
    assert simulated(Job(hollow)) == simulated(Job(path))


def test_the_index_of_a_checkpoint_says_in_which_files_its_tensors_are(checkpoint, simulated, tmp_path):
    path = checkpoint("qwen3_moe", **MANY)
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(path / name, tmp_path / name)
    headers, index = simulated(Job(path)), simulated(Job(tmp_path))
    assert "index" in index.checkpoint_source
    assert (index.checkpoint_files, index.samples) == (headers.checkpoint_files, headers.samples)


@pytest.mark.parametrize("scheme", ["channel", "block", '{"moe": "int8", "overrides": {"o_proj": "none"}}'])
def test_other_schemes_are_planned_as_they_are_loaded(scheme, checkpoint, reports, simulated):
    path = checkpoint("qwen3_moe", **MANY)
    (real,) = reports(path, {SCHEME_VARIABLE: scheme})
    found = simulated(Job(path, device="cpu", schemes=parse(scheme, "a test")))
    assert (found.units, found.streamed) == (real.units.streamed, real.layers.streamed)
    assert found.final == real.final_bytes


def test_a_checkpoint_that_is_quantized_already_is_refused(checkpoint, simulated):
    with pytest.raises(PlanError, match="quantized already"):
        simulated(Job(checkpoint("qwen3_moe", stored="fp8")))


def test_a_missing_tensor_is_what_the_load_would_say(checkpoint, simulated, tmp_path):
    path = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "incomplete")
    _rename_in_header(path / "model.safetensors", "layers.1.mlp.experts.3.up_proj", "layers.1.mlp.experts.3.xx_proj")
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.experts"):
        simulated(Job(path))


def test_a_process_that_is_killed_is_an_error(checkpoint):
    with Planners(2, "harness.regressions:killed") as planners, pytest.raises(PlanError, match="exit code -9"):
        list(planners.run([Job(checkpoint("qwen3_moe"))] * 3))


def test_after_a_failure_the_next_jobs_get_their_own_answers(checkpoint, planners, tmp_path):
    good, bad = Job(checkpoint("qwen3_moe")), Job(tmp_path / "config.json")
    with pytest.raises(PlanError):
        list(planners.run([bad, good]))
    (found,) = planners.run([good])
    assert found.mode == "streaming"


def _rename_in_header(file, name, other):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(name.encode(), other.encode())
    assert len(header) == length
    json.loads(header)
    file.write_bytes(content[:8] + header + content[8 + length :])


def test_backend_that_only_a_chosen_scheme_can_have_is_planned(checkpoint):
    """Cutlass's experts want block-wise scales, and refuse stock's scheme as soon as its method is made."""
    job = Job(
        checkpoint("qwen3_moe"),
        schemes=parse("block", SCHEME_VARIABLE),
        server_args=(("moe_runner_backend", "cutlass"),),
    )
    with Planners(1, "harness.regressions:on_hopper") as planners:
        (found,) = planners.run([job])
    assert found.streamed == 9
    assert found.fallback == 0
