# SPDX-License-Identifier: Apache-2.0
"""Programs that load no plugins by themselves stream when they are started through ``sglang_overlay run``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from sglang_overlay.observe.report import read_folder

SGLANG = Path(util.find_spec("sglang").origin).parent
ONE_BATCH = (
    "sglang.benchmark.one_batch" if (SGLANG / "benchmark" / "one_batch.py").exists() else "sglang.bench_one_batch"
)


@pytest.mark.server
@pytest.mark.parametrize("tp_size", [1, 2])
def test_one_batch_benchmark_streams(tp_size, checkpoint, tmp_path):
    # The benchmark's prompts are random ids up to 10,000.
    path = checkpoint("qwen3", overrides=(("vocab_size", 10240),))
    options = ["--model-path", str(path), "--quantization", "fp8", "--device", "cpu", "--tp-size", str(tp_size)]
    sizes = ["--batch-size", "1", "--input-len", "8", "--output-len", "2"]
    environ = {**os.environ, "SGLANG_STREAMFP8": "require", "SGLANG_STREAMFP8_REPORT": str(tmp_path / "reports")}
    done = subprocess.run(
        [sys.executable, "-m", "sglang_overlay", "run", ONE_BATCH, *options, *sizes],
        env={**environ, "SGLANG_CPU_OMP_THREADS_BIND": "0|0"[: 2 * tp_size - 1]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode in (0, -9, -15), done.stderr[-2000:]
    reports = read_folder(tmp_path / "reports")
    assert [report.mode for report in reports] == ["streaming"] * tp_size
    assert "Prefill" in done.stdout


SPAWNING = """
import multiprocessing
def tell(generation):
    from sglang.srt.model_loader.loader import DefaultModelLoader
    print("generation", generation, "hooked:", hasattr(DefaultModelLoader.load_model, "__wrapped__"), flush=True)
    if generation < 2:
        start(generation + 1)
def start(generation):
    # Programs take either name.
    context = multiprocessing if generation == 1 else multiprocessing.get_context("spawn")
    process = context.Process(target=tell, args=(generation,))
    process.start()
    process.join()
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    start(1)
"""


def test_processes_that_a_program_spawns_load_plugins(tmp_path):
    (tmp_path / "spawning.py").write_text(SPAWNING)
    command = [sys.executable, "-m", "sglang_overlay", "run", "spawning"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"generation .*", done.stdout) == ["generation 1 hooked: True", "generation 2 hooked: True"]


@pytest.mark.every_release
@pytest.mark.parametrize("places", [("weight_cache",), ("disaggregation/encoder", "disaggregation/encode_server.py")])
def test_what_check_says_of_processes_without_plugins_is_so(places):
    """Where SGLang loads them, the note of ``check`` and the documentation can go."""
    found = [path for place in places if (path := SGLANG / "srt" / place).exists()]
    files = [file for path in found for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert not [file for file in files if "load_plugins" in file.read_text()]
