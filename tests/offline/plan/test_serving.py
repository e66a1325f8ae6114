# SPDX-License-Identifier: Apache-2.0
"""How much is planned to be served is what SGLang's own runner serves after a real load."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from harness.pools import pools_of
from workbench.loads.job import LoadJob
from workbench.quality import families

from sglang_overlay.cli import main
from sglang_overlay.observe import terminal
from sglang_overlay.offline.plan import gpus, planner, table
from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import Job, Layout
from sglang_overlay.offline.plan.planner import Request

MEMORY = 1 << 28
ARGUMENTS = {
    "mem_fraction_static": 0.5,
    "max_total_tokens": 10**9,
    "max_running_requests": 3000,
    # As every ``LoadJob``.
    "disable_radix_cache": True,
}
SERVED = {
    "grouped queries": ("qwen3_moe", {}),
    "latent attention": ("deepseek_v3", {}),
    "shorter requests": ("qwen3", {"context_length": 128}),
    "a limit": ("qwen3", {"max_total_tokens": 1000}),
    "fewer requests": ("qwen3", {"max_running_requests": 5}),
    "states of linear attention": ("Qwen3_5MoeForConditionalGeneration", {"max_running_requests": 100}),
}


def small(memory):
    return GPU("small", memory, memory, (9, 0))


@pytest.mark.parametrize("case", SERVED)
def test_planned_pools_are_those_of_a_real_runner(case, simulated, checkpoint, checkpoint_folder):
    family, changes = SERVED[case]
    arguments = {**ARGUMENTS, **changes}
    is_family = family.islower()
    path = checkpoint(family) if is_family else families.build(family, checkpoint_folder)
    real = pools_of(LoadJob(path, streaming="1", server_args=arguments), MEMORY)
    job = Job(path, server_args=tuple(arguments.items()), gpus=(small(MEMORY),))
    (planned,) = simulated(job).serving
    assert planned.tokens == pytest.approx(real.tokens, rel=0.02)
    assert planned.requests == real.requests


def test_ranks_share_heads_and_not_latent_values(simulated, checkpoint):
    tokens = {}
    for family in ("qwen3_moe", "deepseek_v3"):
        for tp in (1, 2):
            job = Job(checkpoint(family), Layout(tp), server_args=tuple(ARGUMENTS.items()), gpus=(small(MEMORY),))
            tokens[family, tp] = simulated(job).serving[0].tokens
    assert tokens["qwen3_moe", 2] == pytest.approx(2 * tokens["qwen3_moe", 1], rel=0.02)
    assert tokens["deepseek_v3", 2] == pytest.approx(tokens["deepseek_v3", 1], rel=0.02)


def test_fraction_is_sglangs_own_for_the_gpu_unless_it_is_given(simulated, checkpoint):
    path, kinds = checkpoint("qwen3"), (gpus.find("L4"), gpus.find("H200"))
    own = [left.mem_fraction_static for left in simulated(Job(path, gpus=kinds)).serving]
    assert own[0] < own[1] < 1
    given = Job(path, gpus=kinds, server_args=(("mem_fraction_static", 0.5),))
    assert [left.mem_fraction_static for left in simulated(given).serving] == [0.5, 0.5]


def test_weights_that_leave_no_room_serve_nothing(simulated, checkpoint):
    path = checkpoint("qwen3")
    final = simulated(Job(path)).final
    (left,) = simulated(
        Job(path, gpus=(small(final + (1 << 20)),), server_args=(("mem_fraction_static", 0.5),))
    ).serving
    assert (left.tokens, left.serves(1)) == (0, False)
    assert "leave no GPU memory for the KV cache" in left.why_none
    assert "no room for a KV cache at --mem-fraction-static 0.5" in left.why_none


def test_table_says_what_is_served_and_whether_the_longest_request_is(planned, checkpoint, capsys):
    arguments = (("max_total_tokens", 1000), ("context_length", 2000))
    h200 = gpus.find("H200")
    found = planned(Request(checkpoint("qwen3"), modes=("streaming",), gpus=(h200,), server_args=arguments))
    table.print_plan(terminal.console(), found, h200)
    text = capsys.readouterr().out
    assert "leaves 1,000 tokens of KV cache" in text
    assert "too few for the longest request, 2,000 tokens" in text


@pytest.mark.usefixtures("planned_here")
def test_fewest_ranks_of_each_gpu(checkpoint):
    """Four heads of keys and values: SGLang refuses 16 ranks."""
    path = checkpoint("qwen3_moe")
    alone, shared = 6 << 20, 4 << 20
    kinds = (small(alone), GPU("smaller", shared, shared, (9, 0)), GPU("none", 1 << 20, 1 << 20, (9, 0)))
    arguments = (("mem_fraction_static", 0.9), ("context_length", 64))
    found = planner.fits(Request(path, modes=("stock", "streaming"), gpus=kinds, server_args=arguments))
    by_mode = {(fit.gpu.name, fit.mode): fit.tp for fit in found}
    assert by_mode["small", "streaming"] == 1
    assert by_mode["small", "stock"] > by_mode["small", "streaming"]
    assert by_mode["smaller", "streaming"] > 1
    assert by_mode["none", "streaming"] is None
    assert all(fit.serving.serves() for fit in found if fit.tp)


def test_table_says_why_nothing_is_served(planned, checkpoint, capsys):
    a100 = gpus.find("A100")
    found = planned(Request(checkpoint("qwen3_moe"), modes=("streaming",), gpus=(a100,)))
    table.print_plan(terminal.console(), found, a100)
    assert "loads but serves nothing: SGLang's Triton kernels of fp8 experts" in capsys.readouterr().out


@pytest.mark.usefixtures("planned_here")
@pytest.mark.parametrize(("family", "tp"), [("qwen3_moe", None), ("qwen3", 1)])
def test_gpu_that_has_no_kernels_for_fp8_experts_serves_none(family, tp, checkpoint, capsys):
    (fit,) = planner.fits(Request(checkpoint(family), modes=("streaming",), gpus=(gpus.find("A100"),)))
    assert fit.tp == tp
    table.print_fits(terminal.console(), family, [fit])
    assert ("kernels of fp8 experts" in capsys.readouterr().out) == (tp is None)


@pytest.mark.usefixtures("planned_here")
def test_command_lists_what_fits(checkpoint):
    arguments = ("--model-path", str(checkpoint("qwen3")), "--fits", "--gpu", "H200")
    listed = CliRunner().invoke(main, ["plan", *arguments])
    assert listed.exit_code == 0, listed.output
    assert "H200" in listed.output
    assert "TP 1: " in listed.output
    rows = json.loads(CliRunner().invoke(main, ["plan", *arguments, "--json"]).stdout)["fits"]
    assert [(row["gpu"], row["mode"], row["tp"]) for row in rows] == [("H200", "stock", 1), ("H200", "streaming", 1)]


@pytest.mark.parametrize(
    "given",
    [
        ("--tp", "2"),
        ("--ep", "1"),
        ("--pp", "2"),
        ("--dp", "2"),
        ("--enable-dp-attention",),
        ("--every-rank",),
        ("--device", "cpu"),
        ("--png", "chart.png"),
    ],
)
def test_what_the_list_would_ignore_is_refused(given, tmp_path):
    ran = CliRunner().invoke(main, ["plan", "--model-path", str(tmp_path), "--fits", *given])
    assert ran.exit_code == 2
    assert f"leave out {given[0]}" in ran.output


class TestNameOnTheHub:
    @pytest.mark.usefixtures("planned_here")
    def test_in_the_cache_is_planned(self, checkpoint, hub, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.folder))
        name, folder = hub(checkpoint("qwen3"), "planned")
        assert (folder / "config.json").exists()
        ran = CliRunner().invoke(main, ["plan", "--model-path", str(name), "--json"])
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout)["model"]["path"].endswith("0123abcd")
        shutil.rmtree(folder)

    def test_elsewhere_is_an_error_that_says_what_to_do(self):
        ran = CliRunner().invoke(main, ["plan", "--model-path", "tiny/absent"])
        assert ran.exit_code == 2
        assert "hf download tiny/absent config.json" in ran.output
