"""Servers here are small real processes; how SGLang itself starts is the demo's and the serving tests' business."""

from __future__ import annotations

import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest
from workbench.loads import serving

SERVER = """
    import http.server, json, os, signal, subprocess, sys, time

    port, child_file, ignore_term = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "stubborn"
    if ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(child_file, "w") as file:
        file.write(str(child.pid))
    ready_at = time.monotonic() + float(sys.argv[4])
    print("listening, setting is", os.environ.get("SETTING", "absent"), flush=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass  # As many lines as there are polls would push the first one out of the log's tail.

        def reply(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self):
            self.reply(200 if time.monotonic() > ready_at else 503, {})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if request["messages"][0]["content"] == "refuse":
                self.reply(400, {"error": {"message": "no such luck"}})
                return
            said = f"{request['messages'][0]['content']} at {request['temperature']}"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make_launch(folder: Path, manner: str = "polite", delay: float = 0.0, **variables: str | None) -> serving.Launch:
    script = folder / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    port = serving.free_port()
    command = (sys.executable, str(script), str(port), str(folder / "child.pid"), manner, str(delay))
    return serving.Launch(command, port, folder / "logs" / "server.log", variables)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone_within(seconds: float, pid: int) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "POLL_SECONDS", 0.05)


def test_server_is_ready_inside_the_block_and_nothing_is_left_after_it(tmp_path: Path) -> None:
    with serving.running(make_launch(tmp_path), timeout=30) as url:
        child = int((tmp_path / "child.pid").read_text())
        assert is_running(child)
        assert serving.ask(url, "hello") == "hello at 0"
    assert gone_within(5, child)


def test_block_waits_until_the_server_says_it_is_ready(tmp_path: Path) -> None:
    waited: list[float] = []
    with serving.running(make_launch(tmp_path, delay=1.0), timeout=30, waiting=waited.append):
        assert waited[-1] > 0.8
    assert waited == sorted(waited)


def test_server_that_ignores_termination_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STOP_SECONDS", 0.3)
    with serving.running(make_launch(tmp_path, manner="stubborn"), timeout=30):
        child = int((tmp_path / "child.pid").read_text())
    assert gone_within(5, child)


def test_error_inside_the_block_stops_the_server(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), serving.running(make_launch(tmp_path), timeout=30):
        raise ZeroDivisionError
    assert gone_within(5, int((tmp_path / "child.pid").read_text()))


def test_server_that_ends_early_is_reported_with_exit_code_and_log(tmp_path: Path) -> None:
    code = "import sys; print('first'); print('x' * 2000); print('out of luck'); sys.exit(7)"
    launch = serving.Launch((sys.executable, "-c", code), serving.free_port(), tmp_path / "server.log")
    with pytest.raises(serving.ServerError) as caught, serving.running(launch, timeout=30):
        pass
    message = str(caught.value)
    assert "exit code 7" in message
    assert str(launch.log) in message
    assert "| out of luck" in message
    assert len(message) < 1500


def test_server_killed_by_a_signal_is_reported(tmp_path: Path) -> None:
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    launch = serving.Launch((sys.executable, "-c", code), serving.free_port(), tmp_path / "server.log")
    with pytest.raises(serving.ServerError, match="exit code -9"), serving.running(launch, timeout=30):
        pass


def test_server_that_is_never_ready_is_stopped_after_the_timeout(tmp_path: Path) -> None:
    launch = make_launch(tmp_path, delay=600)
    started = time.monotonic()
    never_ready = pytest.raises(serving.ServerError, match=r"not ready after 2 s(.|\n)*listening")
    with never_ready, serving.running(launch, timeout=2):
        pass
    assert time.monotonic() - started < 20
    assert gone_within(5, int((tmp_path / "child.pid").read_text()))


def test_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    launch = serving.Launch((str(tmp_path / "nothing"),), serving.free_port(), tmp_path / "server.log")
    with pytest.raises(serving.ServerError, match="could not be started"), serving.running(launch, timeout=5):
        pass


@pytest.mark.parametrize(("given", "seen"), [("on", "on"), (None, "absent")])
def test_variables_are_set_and_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, seen: str
) -> None:
    monkeypatch.setenv("SETTING", "inherited")
    launch = make_launch(tmp_path, SETTING=given)
    with serving.running(launch, timeout=30):
        assert f"setting is {seen}" in launch.log.read_text()


def test_proxy_of_the_outside_world_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{serving.free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving.running(make_launch(tmp_path), timeout=30) as url:
        assert serving.ask(url, "hello") == "hello at 0"


def test_refused_question_is_a_server_error(tmp_path: Path) -> None:
    with (
        serving.running(make_launch(tmp_path), timeout=30) as url,
        pytest.raises(serving.ServerError, match=r"did not answer.*no such luck"),
    ):
        serving.ask(url, "refuse")


def test_refused_post_is_a_server_error(tmp_path: Path) -> None:
    with (
        serving.running(make_launch(tmp_path), timeout=30) as url,
        pytest.raises(serving.ServerError, match=r"chat was answered with 400: .*no such luck"),
    ):
        serving.post(url, "chat", {"messages": [{"content": "refuse"}]})


def test_post_that_nobody_answers_is_a_server_error() -> None:
    with pytest.raises(serving.ServerError, match=r"chat was not answered: ConnectError"):
        serving.post(f"http://{serving.HOST}:{serving.free_port()}", "chat", {})


def test_command_is_the_one_a_user_types() -> None:
    command = serving.sglang_command("python", "models/m", 30000, ("--quantization", "fp8"))
    assert " ".join(command) == (
        "python -m sglang.launch_server --model-path models/m --host 127.0.0.1 --port 30000 --sleep-on-idle"
        " --quantization fp8"
    )


def test_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind((serving.HOST, serving.free_port()))
        listener.listen()
