"""Start, ask and stop a real server in its own process group.

    launch = Launch(command=(python, "-m", "sglang.launch_server", ...), port=port, log=Path("server.log"))
    with running(launch, timeout=600) as url:
        answer = ask(url, "Hello")

The server writes to a log file, never to the terminal. Every error includes the end of that log, and nothing that the
server started outlives the `with` block.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from workbench.loads.loads import free_port as free_port

HOST = "127.0.0.1"
POLL_SECONDS = 0.5
STOP_SECONDS = 30.0
ANSWER_SECONDS = 600.0
POST_SECONDS = 300.0
TAIL_LINES = 40


class ServerError(RuntimeError):
    """The server did not start, or did not answer; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Launch:
    """A server to start.

    Attributes:
        command: program and arguments.
        port: where it will listen on `HOST`.
        log: file for its output, overwritten; its folder is created, and is the server's working folder.
        variables: environment variables to set besides the inherited ones; None removes one.
        ready: path that answers 200 only once the server is ready.
    """

    command: tuple[str, ...]
    port: int
    log: Path
    variables: Mapping[str, str | None] = field(default_factory=dict)
    ready: str = "/health_generate"

    @property
    def url(self) -> str:
        """Address of the server, without a path."""
        return f"http://{HOST}:{self.port}"


def sglang_command(python: str, model: str, port: int, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The command that serves `model`: what a user types, on this port and with `--sleep-on-idle`.

    An idle server sleeps: SGLang's scheduler asks for requests in a loop, which takes a core from what runs beside it.
    """
    served = ("--model-path", model, "--host", HOST, "--port", str(port), "--sleep-on-idle")
    return (python, "-m", "sglang.launch_server", *served, *arguments)


def no_news(seconds: float) -> None:
    """Does nothing: the default for ``waiting``."""


@contextlib.contextmanager
def running(launch: Launch, timeout: float, waiting: Callable[[float], None] = no_news) -> Iterator[str]:
    """Start the server, wait until it is ready, and stop it at the end of the block.

    Args:
        launch: what to start.
        timeout: seconds until it must be ready.
        waiting: called repeatedly with the seconds waited so far.

    Yields:
        The server's address.

    Raises:
        ServerError: it ended, or was not ready in time.
    """
    process = _start(launch)
    try:
        _wait_until_ready(process, launch, timeout, waiting)
        yield launch.url
    finally:
        stop(process)


def _start(launch: Launch) -> subprocess.Popen[bytes]:
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    merged = {**os.environ, **launch.variables}
    environment = {name: value for name, value in merged.items() if value is not None}
    with launch.log.open("wb") as log:
        try:
            return subprocess.Popen(
                launch.command,
                env=environment,
                cwd=launch.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"{launch.command[0]} could not be started: {error}") from error


def _wait_until_ready(
    process: subprocess.Popen[bytes], launch: Launch, timeout: float, waiting: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while not _answers(launch):
        waited = time.monotonic() - started
        if process.poll() is not None:
            raise ServerError(
                f"The server ended with exit code {process.returncode} before it was ready.\n{tail(launch)}"
            )
        if waited > timeout:
            raise ServerError(f"The server was not ready after {timeout:.0f} s.\n{tail(launch)}")
        waiting(waited)
        time.sleep(POLL_SECONDS)


def _answers(launch: Launch) -> bool:
    try:
        with direct_client(30) as client:
            return client.get(launch.url + launch.ready).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def direct_client(seconds: float) -> httpx.Client:
    """A client without proxies, for requests to this machine."""
    return httpx.Client(trust_env=False, timeout=seconds)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the rest of its process group: first with a signal that it can handle, then with SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    # The group's number is that of the process started here, and is not reused while a member lives.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(launch: Launch) -> str:
    """The end of the server's log, introduced by its path."""
    try:
        content = launch.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"Its log cannot be read: {error}"
    # SGLang prints all its settings in one line of many thousand characters.
    shown = (line if len(line) <= 500 else f"{line[:500]} ..." for line in content[-TAIL_LINES:])
    return "\n".join([f"The last lines of {launch.log}:", *(f"  | {line}" for line in shown)])


def ask(url: str, question: str, max_tokens: int = 32) -> str:
    """The server's greedy answer to `question`, through the chat completion interface.

    Raises:
        ServerError: the request failed; the caller has to add the log.
    """
    import openai

    client = openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="unused",
        timeout=ANSWER_SECONDS,
        max_retries=0,
        http_client=direct_client(ANSWER_SECONDS),
    )
    with client:
        try:
            completion = client.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=max_tokens,
            )
        except openai.OpenAIError as error:
            raise ServerError(f"The server did not answer: {error}") from error
    return completion.choices[0].message.content or ""


def input_logprobs(url: str, windows: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """What the server says of text, by ``/generate``: logprobs in nats of each window's tokens but the first.

    Raises:
        ServerError: the request failed; the caller has to add the log.
    """
    content = {
        "input_ids": [list(window) for window in windows],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    found = (answer["meta_info"]["input_token_logprobs"] for answer in post(url, "generate", content).json())
    return [tuple(logprob for logprob, *_ in window[1:]) for window in found]


def post(url: str, path: str, content: Mapping[str, Any]) -> httpx.Response:
    """The server's answer, a success.

    Raises:
        ServerError: it is none, or there is none; the caller knows the log.
    """
    try:
        with direct_client(POST_SECONDS) as client:
            response = client.post(f"{url}/{path}", json=content)
    except httpx.HTTPError as error:
        raise ServerError(f"{path} was not answered: {error!r}") from error
    if response.status_code != httpx.codes.OK:
        raise ServerError(f"{path} was answered with {response.status_code}: {response.text}")
    return response
