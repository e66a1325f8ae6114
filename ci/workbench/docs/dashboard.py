"""Check the dashboard docs/grafana.json: a real Prometheus scrapes a real server, and every expression has data."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from sglang_overlay.observe.gauges import PREFIX
from sglang_overlay.observe.load_metrics import METRICS
from sglang_overlay.settings import MODE_VARIABLE
from workbench.loads import serving
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.releases import environment

DASHBOARD = environment.CLONE / "docs" / "grafana.json"
PAGE = environment.CLONE / "docs" / "report.md"
START_SECONDS = 60.0
SCRAPE_SECONDS = 120.0
INTERVAL = "5s"
ANY_NAME = PREFIX.replace(":", "[:_]")
"""Both names of a metric: without UTF-8, as for Prometheus 2, prometheus_client puts an underscore for the colon."""
RANKS = f'count({{__name__=~"{ANY_NAME}load_seconds"}})'
_LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")


class DashboardError(RuntimeError):
    """An expression cannot be checked, or has no data; the message names it."""


@dataclass(frozen=True)
class Expression:
    """A PromQL expression, and the panel or variable it belongs to."""

    place: str
    text: str


def expressions(dashboard: dict[str, Any]) -> Iterator[Expression]:
    """What the dashboard asks Prometheus, with all models and instances chosen."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            text = _LABEL_VALUES.sub(r"count by (\2) (\1)", variable["query"]["query"])
            yield Expression(f"variable {variable['name']}", _filled(text))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield Expression(panel["title"], _filled(target["expr"]))


def alerts() -> list[Expression]:
    """Expressions that docs/report.md recommends for alerts; they have no data as long as all is well."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [Expression("alert", line.strip()) for line in lines if line.startswith("    {__name__=~")]


def unknown_metrics(text: str) -> list[str]:
    """Names in an expression that this package does not export."""
    exported = {metric.name for metric in METRICS}
    asked = re.findall(rf'__name__=~"{re.escape(ANY_NAME)}([^"]*)"', text)
    named = [name for names in asked for name in names.strip("()").split("|")]
    return [name for name in named if name not in exported]


def _filled(text: str) -> str:
    """With the value that Grafana gives its variables where all is chosen."""
    return re.sub(r"\$\w+", ".*", text)


def prometheus(program: str, server: serving.Launch, folder: Path) -> serving.Launch:
    """A Prometheus that scrapes this server, with all its files in ``folder``."""
    port = serving.free_port()
    targets = [f"{serving.HOST}:{server.port}"]
    config = {
        "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL},
        "scrape_configs": [{"job_name": "sglang", "static_configs": [{"targets": targets}]}],
    }
    file = folder / "prometheus.json"
    # JSON is YAML as well.
    file.write_text(json.dumps(config), encoding="utf-8")
    options = (
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={serving.HOST}:{port}",
    )
    return serving.Launch((program, *options), port, folder / "prometheus.log", ready="/-/ready")


def query(url: str, text: str) -> list[dict[str, Any]]:
    """The series that Prometheus answers with.

    Raises:
        DashboardError: it refused the expression.
    """
    with serving.direct_client(30) as client:
        answer = client.get(f"{url}/api/v1/query", params={"query": text}).json()
    if answer["status"] != "success":
        raise DashboardError(f"Prometheus refuses {text}: {answer['error']}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def _wait_for_ranks(url: str, wanted: int) -> None:
    """Until a scrape has brought the metrics of all ranks."""
    deadline = time.monotonic() + SCRAPE_SECONDS
    while not (found := query(url, RANKS)) or int(found[0]["value"][1]) < wanted:
        if time.monotonic() > deadline:
            with serving.direct_client(30) as client:
                (target,) = client.get(f"{url}/api/v1/targets").json()["data"]["activeTargets"]
            raise DashboardError(
                f"{RANKS} is not {wanted} after {SCRAPE_SECONDS:.0f} s, but {found}; the last scrape took "
                f"{target['lastScrapeDuration']:.1f} s, error: {target['lastError'] or 'none'}"
            )
        time.sleep(1)


def check(url: str) -> list[str]:
    """A line for each expression, with the number of its series.

    Raises:
        DashboardError: one has none, or Prometheus refuses it.
    """
    found = []
    for expression in expressions(json.loads(DASHBOARD.read_text(encoding="utf-8"))):
        series = query(url, expression.text)
        if not series:
            raise DashboardError(f"{expression.place}: no data for {expression.text}")
        found.append(f"{len(series):4}  {expression.place}: {expression.text}")
    for expression in alerts():
        found.append(f"{len(query(url, expression.text)):4}  {expression.place}: {expression.text}")
    return found


@click.command()
@click.option("--prometheus", "program", default="prometheus", show_default=True, help="The program to scrape with.")
@click.option("--tp-size", "ranks", default=2, show_default=True, help="Ranks of the server; all are exported.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds until the server must be ready.")
def main(program: str, ranks: int, timeout: float) -> None:
    """Start a server and a Prometheus that scrapes it, and ask every expression of docs/grafana.json.

    On Debian and Ubuntu, `apt-get install prometheus` brings the program; it runs here as the user who calls this, on
    a free port, with its files in a temporary folder.
    """
    if shutil.which(program) is None:
        raise click.ClickException(f"there is no {program}; on Debian and Ubuntu: apt-get install prometheus")
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = build(CheckpointSpec("qwen3_moe"), folder / "checkpoints")
        port = serving.free_port()
        arguments = ("--quantization", "fp8", "--device", "cpu", "--tp-size", str(ranks), "--enable-metrics")
        server = serving.Launch(
            serving.sglang_command(sys.executable, str(model), port, arguments),
            port,
            folder / "server.log",
            {MODE_VARIABLE: "require", "SGLANG_CPU_OMP_THREADS_BIND": "|".join(["0"] * ranks)},
        )
        try:
            with (
                serving.running(server, timeout),
                serving.running(prometheus(program, server, folder), START_SECONDS) as url,
            ):
                _wait_for_ranks(url, ranks)
                click.echo("\n".join(check(url)))
        except (serving.ServerError, DashboardError) as error:
            raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
