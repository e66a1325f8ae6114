# SPDX-License-Identifier: Apache-2.0
"""The command a user types, over HTTP: it streams, answers, stops, and refuses a setting it does not know."""

from __future__ import annotations

import sys

import psutil
import pytest
from workbench import serving

from sglang_overlay.observe.report import read_folder

pytestmark = pytest.mark.server


@pytest.fixture
def launch(checkpoint, tmp_path):
    def make(**variables):
        port = serving.free_port()
        arguments = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info")
        command = serving.sglang_command(sys.executable, str(checkpoint("qwen3_moe")), port, arguments)
        return serving.Launch(command, port, tmp_path / "server.log", variables)

    return make


def started_by(server):
    """The server's process and all that it has started."""
    (parent,) = (process for process in psutil.Process().children() if str(server.port) in process.cmdline())
    return [parent, *parent.children(recursive=True)]


def test_server_streams_and_answers_and_leaves_nothing_behind(launch, tmp_path):
    server = launch(SGLANG_STREAMFP8="require", SGLANG_STREAMFP8_REPORT=str(tmp_path / "reports"))
    with serving.running(server, timeout=300) as url:
        family = started_by(server)
        answers = {serving.ask(url, "Name a colour.", max_tokens=8) for _ in range(2)}
    (report,) = read_folder(tmp_path / "reports")
    assert len(answers) == 1
    assert report.mode == "streaming"
    assert report.units.streamed > 0
    assert f"StreamFP8: {report.units.streamed} units in " in server.log.read_text()
    assert len(family) >= 3
    # Early releases kill the scheduler without waiting for its end.
    psutil.wait_procs(family, timeout=30)
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_unknown_setting_stops_the_server_with_the_valid_ones(launch):
    server = launch(SGLANG_STREAMFP8="sometimes")
    with pytest.raises(serving.ServerError, match=r"exit code 1 (.|\n)*'sometimes' is not a known value"):  # noqa: SIM117
        with serving.running(server, timeout=300):
            pass
