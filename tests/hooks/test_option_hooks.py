# SPDX-License-Identifier: Apache-2.0
"""A scheme as an option of the server is the same choice as in the environment, and contradictions are errors."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace

import pytest
from harness.streamed import assert_streamed, load_reported
from workbench.loads import serving
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare

from sglang_overlay.observe.report import read_folder
from sglang_overlay.schemes.choice import FLAGS
from sglang_overlay.settings import REPORT_VARIABLE, SCHEME_VARIABLE

BLOCKS = (("hidden_size", 256), ("intermediate_size", 512), ("moe_intermediate_size", 128))
BLOCK_IN_LOADER = {"streamfp8": {"scheme": "block"}}
BLOCK_AND_INT8 = {"linear": "block", "moe": "int8"}

PARSED = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
quantizations, *others = sys.argv[1:]
for quantization in quantizations.split(","):
    found = prepare_server_args(["--quantization", quantization, *others])
    if hasattr(found, "resolve_once"):
        found.resolve_once()
    print("PARSED", found.quantization, found.speculative_draft_model_quantization, found.model_loader_extra_config)
"""
ENGINE = """
import json, sys
import sglang
model, port, quantization, prompts = json.loads(sys.argv[1])
engine = sglang.Engine(
    model_path=model, device="cpu", quantization=quantization, random_seed=0, log_level="info", port=port
)
try:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    print("TOKENS", json.dumps([answer["output_ids"] for answer in answers]), flush=True)
finally:
    engine.shutdown()
"""


@pytest.fixture
def parse(forked_python, checkpoint):
    """What SGLang makes of values of ``--quantization``, in a process of its own with its plugins loaded."""

    def run(*quantizations, others=(), **variables):
        given = [",".join(quantizations), "--model-path", str(checkpoint("qwen3")), "--device", "cpu", *others]
        return forked_python.run(PARSED, given, {**os.environ, **variables})

    return run


@pytest.mark.every_release
def test_flags_are_fp8_with_a_scheme_for_the_loader(parse):
    result = parse(*FLAGS, others=["--model-loader-extra-config", '{"num_threads": 2}'])
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^PARSED (\S+) \S+ (.*)$", result.stdout, re.MULTILINE)
    assert [name for name, _ in found] == ["fp8"] * len(FLAGS)
    expected = [{"num_threads": 2, "streamfp8": {"scheme": scheme}} for scheme in FLAGS.values()]
    assert [json.loads(config) for _, config in found] == expected


@pytest.mark.parametrize(
    ("quantization", "others", "variables", "said"),
    [
        pytest.param(
            "fp8_block",
            [],
            {SCHEME_VARIABLE: "channel"},
            "--quantization fp8_block and SGLANG_STREAMFP8_SCHEME=channel choose different schemes",
            id="variable",
        ),
        pytest.param(
            "fp8_block",
            ["--model-loader-extra-config", '{"streamfp8": {"scheme": "tensor"}}'],
            {},
            "--quantization fp8_block and {'scheme': 'tensor'} choose different schemes",
            id="loader",
        ),
        pytest.param(
            "fp8",
            ["--speculative-draft-model-quantization", "fp8_block"],
            {},
            "--speculative-draft-model-quantization fp8_block belongs with --quantization fp8_block",
            id="draft",
        ),
        pytest.param("fp8_block", [], {"SGLANG_STREAMFP8": "0"}, "invalid choice: 'fp8_block'", id="off"),
    ],
)
def test_contradiction_ends_the_start(quantization, others, variables, said, parse):
    result = parse(quantization, others=others, **variables)
    assert result.returncode != 0
    assert said in result.stderr


def test_same_choice_twice_is_none(parse):
    draft = ["--speculative-draft-model-quantization", "fp8_block"]
    result = parse("fp8_block", others=draft, **{SCHEME_VARIABLE: "block"})
    assert "PARSED fp8 fp8 " in result.stdout, result.stderr


@pytest.mark.every_release
def test_flag_loads_what_the_variable_does(workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", overrides=BLOCKS)
    by_variable = LoadJob(path, environ={SCHEME_VARIABLE: "block"}, prompts=PROMPTS)
    by_flag = LoadJob(path, quantization="fp8_block", loader_config={"num_threads": 2}, prompts=PROMPTS)
    expected, (result, reports) = workers.load(by_variable), load_reported(workers.load, by_flag, tmp_path)
    assert compare(expected, result) == []
    assert_streamed(reports)
    assert reports[0].scheme == "block"


def test_loader_config_takes_the_json_that_the_variable_takes(workers, checkpoint):
    job = LoadJob(checkpoint("qwen3_moe", overrides=BLOCKS), prompts=PROMPTS)
    expected = workers.load(replace(job, environ={SCHEME_VARIABLE: json.dumps(BLOCK_AND_INT8)}))
    result = workers.load(replace(job, loader_config={"streamfp8": {"scheme": BLOCK_AND_INT8}}))
    assert compare(expected, result) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        pytest.param(
            {"loader_config": BLOCK_IN_LOADER, "environ": {SCHEME_VARIABLE: "channel"}},
            "--quantization fp8_block and SGLANG_STREAMFP8_SCHEME=channel choose different schemes",
            id="variable",
        ),
        pytest.param(
            {"loader_config": BLOCK_IN_LOADER, "server_args": {"load_format": "sharded_state"}},
            "--quantization fp8_block, but this fp8 load cannot be streamed: ShardedStateLoader loads only",
            id="sharded state",
        ),
        pytest.param({"loader_config": BLOCK_IN_LOADER, "streaming": "0"}, "{'streamfp8'}", id="off"),
        pytest.param({"loader_config": {"streamfp9": 1}}, "{'streamfp9'}", id="SGLang's own check"),
    ],
)
def test_what_cannot_be_is_refused(fields, said, workers, checkpoint):
    with pytest.raises(LoadFailed, match=re.escape(said)):
        workers.load(LoadJob(checkpoint("qwen3_moe", overrides=BLOCKS), **fields))


@pytest.mark.full
@pytest.mark.server
def test_server_and_engine_take_the_flag(checkpoint, tmp_path, forked_python):
    path = checkpoint("qwen3_moe", overrides=BLOCKS)
    port = serving.free_port()
    options = ("--quantization", "fp8_block", "--device", "cpu", "--log-level", "info", "--random-seed", "0")
    command = serving.sglang_command(sys.executable, str(path), port, options)
    reports = {REPORT_VARIABLE: str(tmp_path / "reports")}
    server = serving.Launch(command, port, tmp_path / "server.log", reports)
    prompts = [list(prompt) for prompt in PROMPTS]
    with serving.running(server, timeout=600) as url:
        sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        answers = serving.post(url, "generate", {"input_ids": prompts, "sampling_params": sampling}).json()
    assert "StreamFP8: scheme: block; " in server.log.read_text()
    given = json.dumps([str(path), serving.free_port(), "fp8_block", prompts])
    engine = forked_python.run(ENGINE, [given], {**os.environ, **reports})
    (tokens,) = re.findall(r"^TOKENS (.*)$", engine.stdout, re.MULTILINE)
    assert json.loads(tokens) == [answer["output_ids"] for answer in answers]
    assert [report.scheme for report in read_folder(tmp_path / "reports")] == ["block", "block"]
