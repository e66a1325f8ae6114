# SPDX-License-Identifier: Apache-2.0
"""The command a user types, over HTTP: it streams, answers, tells what loading cost, stops, and refuses a setting it
does not know.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from workbench.loads import serving

from sglang_overlay.load.metrics import STATE
from sglang_overlay.observe.gauges import PREFIX
from sglang_overlay.observe.load_metrics import METRICS, state_of
from sglang_overlay.observe.report import LoadReport, read_folder

pytestmark = pytest.mark.server


def launch(model: Path, folder: Path, *arguments: str, **variables: str) -> serving.Launch:
    port = serving.free_port()
    arguments = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info", *arguments)
    command = serving.sglang_command(sys.executable, str(model), port, arguments)
    return serving.Launch(command, port, folder / "server.log", variables)


def started_by(server):
    """The server's process and all that it has started."""
    (parent,) = (process for process in psutil.Process().children() if str(server.port) in process.cmdline())
    return [parent, *parent.children(recursive=True)]


def fetched(url):
    with serving.direct_client(60) as client:
        return client.get(url).raise_for_status().text


@dataclass(frozen=True)
class Served:
    """What a server did until it was stopped."""

    report: LoadReport
    answers: set[str]
    log: str
    metrics: str
    info: dict[str, Any]
    family: list[psutil.Process]
    health_seconds: float


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    settings = {"SGLANG_STREAMFP8": "require", "SGLANG_STREAMFP8_REPORT": str(folder / "reports")}
    server = launch(checkpoint("qwen3_moe"), folder, "--enable-metrics", **settings)
    with serving.running(server, timeout=300) as url:
        family = started_by(server)
        answers = {serving.ask(url, "Name a colour.", max_tokens=8) for _ in range(2)}
        metrics, info = fetched(f"{url}/metrics"), json.loads(fetched(f"{url}/server_info"))
        asked = time.monotonic()
        fetched(f"{url}/health")
        health_seconds = time.monotonic() - asked
    (report,) = read_folder(folder / "reports")
    return Served(report, answers, server.log.read_text(), metrics, info, family, health_seconds)


def test_server_streams_and_answers(served):
    assert len(served.answers) == 1
    assert served.report.mode == "streaming"
    assert served.report.node == platform.node() != ""
    assert served.report.units.streamed > 0
    assert f"StreamFP8: {served.report.units.streamed} units in " in served.log


def test_health_answers_within_the_timeout_of_the_manifests_probes(served):
    """It generates a token, and some releases wait a second for it: more than Kubernetes' default timeout."""
    manifest = Path(__file__).parents[2] / "ci" / "container" / "kubernetes.yaml"
    deployment, _ = yaml.safe_load_all(manifest.read_text(encoding="utf-8"))
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = [server[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["httpGet"]["path"] for probe in probes} == {"/health"}
    assert served.health_seconds < min(probe["timeoutSeconds"] for probe in probes)


def test_server_leaves_nothing_behind(served):
    assert len(served.family) >= 3
    # Early releases kill the scheduler without waiting for its end.
    psutil.wait_procs(served.family, timeout=30)
    assert not [one for one in served.family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metrics_tell_what_loading_cost(served, metric):
    """Beside SGLang's own, with its labels."""
    (series,) = re.findall(rf"^{PREFIX}{metric.name}(\{{.*\}}) (\S+)$", served.metrics, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', series[0]))
    assert float(series[1]) == metric.value(served.report)
    # Which it would have if the series of several processes were told apart.
    assert "pid" not in labels
    assert labels["model_name"] == served.report.model_path
    assert [labels[name] for name in ("tp_rank", "pp_rank", "role", "mode")] == ["0", "0", "target", "streaming"]
    assert f"# HELP {PREFIX}{metric.name} {metric.documentation}\n" in served.metrics


def test_server_info_tells_what_loading_cost(served):
    (state,) = served.info["internal_states"]
    assert state[STATE] == [json.loads(json.dumps(state_of(served.report)))]


def test_unknown_setting_stops_the_server_with_the_valid_ones(checkpoint, tmp_path):
    server = launch(checkpoint("qwen3_moe"), tmp_path, SGLANG_STREAMFP8="sometimes")
    with pytest.raises(serving.ServerError, match=r"exit code 1 (.|\n)*'sometimes' is not a known value"):  # noqa: SIM117
        with serving.running(server, timeout=300):
            pass
