# SPDX-License-Identifier: Apache-2.0
"""Ray's actors stream where the job says so, and the driver says that they do not where it does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.server

SCRIPT = """
import logging
import ray
logging.basicConfig()
ray.init(num_cpus=1, include_dashboard=False, runtime_env={runtime_env!r})

@ray.remote
class Actor:
    def is_active(self):
        from sglang.srt.model_loader.loader import DefaultModelLoader
        return hasattr(DefaultModelLoader.load_model, "__wrapped__")

print("active:", ray.get(Actor.remote().is_active.remote()))
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.ray.engine
ray.shutdown()
"""


def run(folder, runtime_env):
    environ = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    script = folder / "driver.py"
    script.write_text(SCRIPT.format(runtime_env=runtime_env))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_actors_stream_with_the_setup_hook(tmp_path):
    done = run(tmp_path, {"worker_process_setup_hook": "sglang.srt.plugins.load_plugins"})
    assert "active: True" in done.stdout
    assert "StreamFP8" not in done.stderr


def test_driver_warns_without_the_setup_hook(tmp_path):
    done = run(tmp_path, {})
    assert "active: False" in done.stdout
    assert done.stderr.count("StreamFP8: Ray's scheduler actors load no plugins") == 1
