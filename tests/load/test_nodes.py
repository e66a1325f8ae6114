# SPDX-License-Identifier: Apache-2.0
"""Two nodes, here two servers on one machine that meet over the loopback interface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workbench.loads import serving

from sglang_overlay.observe.report import read_folder
from sglang_overlay.settings import MODE_VARIABLE, REPORT_VARIABLE

DEVICE = () if torch.cuda.is_available() else ("--device", "cpu")
ON_THE_CPU = ("--max-total-tokens", "1024", "--disable-radix-cache")


def node(rank: int, model: Path, meeting_port: int, folder: Path, mode: str) -> serving.Launch:
    port = serving.free_port()
    arguments = ("--quantization", "fp8", "--tp-size", "2", *DEVICE, *ON_THE_CPU)
    meeting = ("--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", f"{serving.HOST}:{meeting_port}")
    return serving.Launch(
        command=serving.sglang_command(sys.executable, str(model), port, (*arguments, *meeting)),
        port=port,
        log=folder / f"node{rank}" / "server.log",
        variables={
            MODE_VARIABLE: mode,
            REPORT_VARIABLE: str(folder / "reports"),
            "SGLANG_CPU_OMP_THREADS_BIND": "0|0",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )


def answer(model: Path, folder: Path, mode: str) -> str:
    """What two nodes say together."""
    meeting_port = serving.free_port()
    first, second = (node(rank, model, meeting_port, folder, mode) for rank in (0, 1))
    other: subprocess.Popen[bytes] = serving._start(second)
    try:
        with serving.running(first, timeout=400) as url:
            return serving.ask(url, "What is a unit?", max_tokens=8)
    finally:
        serving.stop(other)


@pytest.mark.server
def test_two_nodes_stream_and_answer_as_stock(checkpoint, tmp_path):
    model = checkpoint("qwen3_moe", files=3)
    stock = answer(model, tmp_path / "stock", "0")
    assert answer(model, tmp_path / "streaming", "require") == stock
    reports = read_folder(tmp_path / "streaming" / "reports")
    assert [(report.mode, report.ranks.tp.rank) for report in reports] == [("streaming", 0), ("streaming", 1)]
