# SPDX-License-Identifier: Apache-2.0
"""A server that is stopped or loses its scheduler while it loads ends as stock's does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from workbench.loads import serving

HARNESS = Path(__file__).parents[1] / "harness"
SHARED_MEMORY = Path("/dev/shm")
START_SECONDS = 300
END_SECONDS = 60


@dataclass
class LoadingServer:
    """A real server whose model stalls while it is loaded.

    Attributes:
        members: the processes it has started by then.
        shared: names in shared memory that these use.
    """

    process: subprocess.Popen
    marker: Path
    log: Path
    members: list[psutil.Process] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)

    def wait_until_loading(self):
        deadline = time.monotonic() + START_SECONDS
        while not self.marker.exists():
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, "the model is not being loaded"
            time.sleep(0.2)
        server = psutil.Process(self.process.pid)
        self.members = server.children(recursive=True)
        self.shared = {name for process in (server, *self.members) for name in _shared_memory(process.pid)}

    @property
    def scheduler(self):
        return int(self.marker.read_text())

    def exit_code(self):
        """Of the server; None where it is still there after a minute."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        return self.process.returncode

    def survivors(self):
        """Processes it started that outlive it."""
        psutil.wait_procs(self.members, timeout=60)
        return [member for member in self.members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]

    def leaked(self):
        """What is left of its shared memory, by kind."""
        left = [name for name in self.shared if (SHARED_MEMORY / name).exists()]
        return Counter(re.match(r"[a-z]+([._][a-z]+)?", name).group() for name in left)

    def remove(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for member in self.members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


@pytest.fixture
def loading(checkpoint, tmp_path):
    """Stock and streaming servers in the middle of loading."""
    path = checkpoint("qwen3", overrides=(("architectures", ("StallingForCausalLM",)),))
    servers = {mode: _start(path, mode, tmp_path / mode) for mode in ("0", "require")}
    try:
        for server in servers.values():
            server.wait_until_loading()
        yield servers
    finally:
        for server in servers.values():
            server.remove()


def _start(path, mode, folder):
    folder.mkdir()
    port = serving.free_port()
    arguments = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info")
    environ = {
        "SGLANG_STREAMFP8": mode,
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "misbehaving",
        "STALLING_MARKER": str(folder / "marker"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HARNESS), os.environ.get("PYTHONPATH")])),
    }
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            serving.sglang_command(sys.executable, str(path), port, arguments),
            env={**os.environ, **environ},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job starts with SIGINT ignored, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return LoadingServer(process, folder / "marker", folder / "log.txt")


def _shared_memory(pid):
    """Names in shared memory that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return re.findall(rf"{SHARED_MEMORY}/(\S+)$", maps, flags=re.MULTILINE)


@pytest.mark.server
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "victim"),
    [
        pytest.param(signal.SIGTERM, "server", id="SIGTERM"),
        pytest.param(signal.SIGINT, "server", id="SIGINT"),
        pytest.param(signal.SIGKILL, "scheduler", id="scheduler killed"),
    ],
)
def test_server_ends_as_stock_does_while_loading(number, victim, loading):
    for server in loading.values():
        os.kill(server.process.pid if victim == "server" else server.scheduler, number)
    codes = {mode: server.exit_code() for mode, server in loading.items()}
    survivors = {mode: server.survivors() for mode, server in loading.items()}
    leaked = {mode: server.leaked() for mode, server in loading.items()}
    print(codes, survivors, leaked)
    assert codes["require"] == codes["0"]
    assert codes["require"] is not None
    assert survivors["require"] == []
    # Stock itself leaves some: no more than that.
    assert leaked["require"] <= leaked["0"]
