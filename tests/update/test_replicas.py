# SPDX-License-Identifier: Apache-2.0
"""What running servers tell of the weights that they serve, over HTTP: after a load, after updates, and compared."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from click.testing import CliRunner
from harness.mutations import altered
from harness.trainer import broadcast, has_sessions
from update.test_update_serving import generated
from workbench.loads import serving
from workbench.loads.serving import post

from sglang_overlay.cli import main
from sglang_overlay.load.metrics import STATE as LOADS
from sglang_overlay.observe import replicas
from sglang_overlay.observe.gauges import PREFIX
from sglang_overlay.observe.weights_metrics import CHECKSUM_METRICS, UPDATE_METRICS
from sglang_overlay.observe.weights_report import STATE

pytestmark = pytest.mark.server
SEED = 1
LITTLE = ("--max-total-tokens", "1024", "--skip-server-warmup")
START_SECONDS = 900.0
ONE_LAYER = "model.layers.1"


def launch(model, folder, *arguments, **variables):
    port = serving.free_port()
    arguments = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info", *LITTLE, *arguments)
    command = serving.sglang_command(sys.executable, str(model), port, arguments)
    return serving.Launch(command, port, folder / "server.log", variables)


def fetched(url):
    with serving.direct_client(60) as client:
        return client.get(url).raise_for_status().text


def told(url):
    """What ``/server_info`` tells of each rank's weights."""
    (state,) = json.loads(fetched(f"{url}/server_info"))["internal_states"]
    return state[STATE]


def shown(url):
    """Metrics of weights and updates in ``/metrics``, by name and kind of update."""
    found = {}
    for name, labels, value in re.findall(rf"^{PREFIX}(weight\w+)\{{(.*)\}} (\S+)$", fetched(f"{url}/metrics"), re.M):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert (labels["role"], labels["tp_rank"], labels["pp_rank"]) == ("target", "0", "0")
        found[name, labels.get("kind")] = float(value)
    return found


def compared(*urls, **environ):
    """Exit code of ``compare``, and what it prints."""
    result = CliRunner().invoke(main, ["compare", *urls], env=environ)
    return result.exit_code, result.output


def failed(url, folder):
    with pytest.raises(serving.ServerError, match="400"):
        post(url, "update_weights_from_disk", {"model_path": str(folder)})


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy of this machine's is asked."""
    monkeypatch.setenv("no_proxy", serving.HOST)


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory):
    """A server that streamed, and one of stock SGLang that measures its load."""
    model, folders = checkpoint("deepseek_v3"), [tmp_path_factory.mktemp(name) for name in ("streamed", "stock")]
    reports = {"SGLANG_STREAMFP8": "0", "SGLANG_STREAMFP8_REPORT": str(folders[1] / "reports")}
    launches = (
        launch(model, folders[0], "--enable-metrics", SGLANG_STREAMFP8="require"),
        launch(model, folders[1], **reports),
    )
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        started = [
            threads.submit(stack.enter_context, serving.running(each, timeout=START_SECONDS)) for each in launches
        ]
        yield [each.result() for each in started]


def test_server_tells_what_became_of_each_update_and_what_it_serves_then(pair, checkpoint, tmp_path):
    url, stock = pair
    old, new = checkpoint("deepseek_v3"), checkpoint("deepseek_v3", seed=SEED)
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in new.iterdir():
        content = file.read_bytes()
        (torn / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)

    # After the load, and independent of how it was done.
    (loaded,) = told(url)
    assert re.fullmatch("[0-9a-f]{16}", loaded["checksum"])
    assert [loaded[name] for name in ("role", "updates", "failed_updates", "last_update")] == ["target", {}, {}, None]
    (load,) = json.loads(fetched(f"{url}/server_info"))["internal_states"][0][LOADS]
    # All that the model holds but what lies twice in a storage: nothing is left out.
    assert 0.95 < loaded["checksum_bytes"] / load["final_bytes"] <= 1.05
    assert shown(url)["weights_checksum", None] == int(loaded["checksum"][:12], 16)
    assert [each["checksum"] for each in told(stock)] == [loaded["checksum"]]
    assert compared(url, stock) == (0, f"target PP0 TP0: equal, {loaded['checksum']}\n")

    # Requests change nothing of it.
    generated(url)
    assert compared(url, stock)[0] == 0

    # An update from disk.
    post(url, "update_weights_from_disk", {"model_path": str(new)})
    (updated,) = told(url)
    last = updated["last_update"]
    assert updated["checksum"] != loaded["checksum"]
    assert (updated["updates"], updated["failed_updates"]) == ({"disk": 1}, {})
    assert (last["kind"], last["failure"], last["calls"], last["failed_calls"]) == ("disk", None, {"disk": 1}, 0)
    assert last["units"] == last["all_units"] == load["units"]["streamed"]
    assert last["untouched"] == {"parameters": 0, "names": []}
    assert load["streamed_bytes"] < last["bytes"] <= loaded["checksum_bytes"]
    assert 0 < last["seconds"] < 300
    metrics = shown(url)
    assert metrics["weights_checksum", None] == int(updated["checksum"][:12], 16)
    assert {metric.name for metric in (*CHECKSUM_METRICS, *UPDATE_METRICS)} == {name for name, _ in metrics}
    assert [metrics[f"weight_update_{name}", "disk"] for name in ("units", "bytes", "untouched_parameters")] == [
        last["units"],
        last["bytes"],
        0,
    ]
    code, output = compared(url, stock)
    assert code == 1
    assert f"target PP0 TP0: differs\n  {updated['checksum']} {url}\n  {loaded['checksum']} {stock}\n  in " in output
    assert {ONE_LAYER, "model.embed_tokens", "model.norm", "lm_head"} <= set(
        re.findall(r"[\w.]+", output.rpartition("  in ")[2])
    )

    # One that fails.
    failed(url, torn)
    (kept,) = told(url)
    assert kept["checksum"] == updated["checksum"]
    assert (kept["updates"], kept["failed_updates"]) == ({"disk": 1}, {"disk": 1})
    assert "SafetensorError" in kept["last_update"]["failure"]
    assert kept["last_update"]["units"] == 0
    metrics = shown(url)
    assert (metrics["weight_updates", "disk"], metrics["weight_update_failures", "disk"]) == (1, 1)

    # And back in another way: equal weights, equal checksum.
    broadcast(url, old)
    (back,) = told(url)
    last = back["last_update"]
    assert back["checksum"] == loaded["checksum"]
    assert last["kind"] == ("session" if has_sessions() else "broadcast")
    assert list(last["calls"]) == ["broadcast"]
    assert last["units"] == last["all_units"]
    assert shown(url)["weight_updates", last["kind"]] == 1
    assert compared(url, stock)[0] == 0


def test_compare_says_whom_it_cannot_ask(pair):
    url, _ = pair
    nowhere = f"http://{serving.HOST}:{serving.free_port()}"
    code, output = compared(url, nowhere)
    assert code == 1
    assert f"{nowhere} cannot be asked" in output
    code, output = compared(url)
    assert code == 2
    assert "name another" in output
    # Somebody who answers, but not to this.
    code, output = compared(url, f"{url}/v1")
    assert code == 1
    assert f"{url}/v1 answers 404" in output


def test_each_rank_is_told_and_one_that_differs_is_named(checkpoint, tmp_path):
    """Two ranks that share the experts: one of these lies on one rank alone."""
    old, new = checkpoint("qwen3_moe"), checkpoint("qwen3_moe", seed=SEED)
    last = json.loads((old / "config.json").read_text())["num_experts"] - 1

    def keep(tensors):
        for name in [name for name in tensors if f"layers.1.mlp.experts.{last}." not in name]:
            del tensors[name]

    one_expert = altered(new, tmp_path / "one_expert", keep)
    server = launch(old, tmp_path, "--tp-size", "2", "--ep-size", "2", SGLANG_STREAMFP8="require")
    with serving.running(server, timeout=START_SECONDS) as url:
        before, loaded = replicas.ask(url), told(url)
        assert [each["ranks"]["tp"] for each in loaded] == [{"rank": rank, "size": 2} for rank in range(2)]
        post(url, "update_weights_from_disk", {"model_path": str(one_expert)})
        after, updated = replicas.ask(url), told(url)
    assert [each["checksum"] for each in loaded] == [each.checksum for each in before[0].ranks.values()]
    assert len({each["checksum"] for each in loaded}) == 2
    same, differs = replicas.compare([before[0], replicas.Replica("after", after[0].ranks)])
    assert (same.name, same.is_equal, same.layers) == ("target PP0 TP0", True, ())
    assert (differs.name, differs.is_equal, differs.layers) == ("target PP0 TP1", False, (ONE_LAYER,))
    assert [each["checksum"] for each in updated] == [each.checksum for each in after[0].ranks.values()]
    assert [each["last_update"]["units"] for each in updated] == [0, 2]
    assert all("self_attn.qkv_proj" in str(each["last_update"]["untouched"]["names"]) for each in updated)
