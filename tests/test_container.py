# SPDX-License-Identifier: Apache-2.0
"""What ci/container has for images and Kubernetes, run here without either."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sglang.srt.server_args import ServerArgs

from sglang_overlay.hooks import releases
from sglang_overlay.settings import CPU_REFERENCE_VARIABLE, Mode, load_settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "ci" / "container"
DEPLOYMENT, SERVICE = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CHECK,), (SERVER,) = POD["initContainers"], POD["containers"]


def instructions(name: str) -> list[str]:
    """Arguments of the Dockerfile's instructions of this name."""
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def pod_environment() -> dict[str, str]:
    """Variables of the manifest, with names of the pod put in as Kubernetes does it."""
    found = {"POD_NAME": "sglang-fp8-0"}
    for variable in SERVER["env"]:
        if "value" in variable:
            found[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], variable["value"])
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What the Dockerfile copies into the image, where it copies it to."""
    image = tmp_path_factory.mktemp("image")
    for copied in instructions("COPY"):
        *sources, target = copied.split()
        for source in sources:
            place = image / target.lstrip("/")
            place = place / Path(source).name if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", ROOT / source, place], check=True)
    return image


@pytest.fixture(scope="module")
def image_python(tmp_path_factory):
    """A Python that has SGLang and all it brings, pip, and not this package, as in SGLang's published image."""
    folder = tmp_path_factory.mktemp("python")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python3"
    (site,) = folder.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages") and "/clones/" not in path]
    (site / "sglang.pth").write_text("\n".join(packages))
    return python


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "PYTHONPATH"))}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*map(str, command)], env={**clean, **hidden, **variables}, cwd="/", capture_output=True, text=True, timeout=300
    )


@pytest.mark.full
def test_dockerfiles_step_installs_the_package_where_sglang_streams_with_it(tree, image_python):
    (step,) = instructions("RUN")
    (script,) = yaml.safe_load(step)
    # Without an index, as this machine may have none; the image's build has one.
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PATH": f"{image_python.parent}:{os.environ['PATH']}",
    }
    done = run(tree / script.lstrip("/"), **offline)
    assert done.returncode == 0, done.stderr[-2000:]
    # Said by the installed package: this Python and its working folder have no other.
    assert re.search(r"StreamFP8 \S+: active, SGLang ", done.stdout)
    assert not list((tree / "opt" / "sglang-streamfp8").glob("build")), "the tree was built in"


def test_image_is_of_the_newest_release():
    (image,) = instructions("ARG")
    assert image == f"SGLANG_IMAGE=lmsysorg/sglang:v{releases.supported()[-1]}"
    assert {CHECK["image"], SERVER["image"]} == {f"sglang-streamfp8:v{releases.supported()[-1]}"}


def test_pods_settings_are_known_and_each_has_a_folder_of_reports():
    settings = load_settings({name: value for name, value in pod_environment().items() if name.startswith("SGLANG_")})
    assert settings.mode is Mode.REQUIRE
    assert not settings.cpu_reference, CPU_REFERENCE_VARIABLE
    (volume,) = (mount for mount in SERVER["volumeMounts"] if mount["name"] == "reports")
    assert settings.report_folder == Path(volume["mountPath"], "sglang-fp8-0")
    assert CHECK["env"] == SERVER["env"]
    # What it says to a pod without its GPU: test_cli.py.
    assert CHECK["command"] == ["python3", "-m", "sglang_overlay", "check"]
    # Or services of the namespace could set SGLANG_PORT.
    assert POD["enableServiceLinks"] is False


def test_sglang_knows_the_pods_arguments_and_serves_where_the_pod_is_asked():
    assert SERVER["command"] == ["python3", "-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = parser.parse_args(SERVER["args"])
    assert (arguments.quantization, arguments.enable_metrics) == ("fp8", True)
    mounts = {mount["mountPath"]: mount["name"] for mount in SERVER["volumeMounts"]}
    assert arguments.model_path in mounts
    assert set(mounts.values()) == {volume["name"] for volume in POD["volumes"]}
    (port,) = SERVER["ports"]
    assert port["containerPort"] == arguments.port
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(arguments.port)
    assert [found["targetPort"] for found in SERVICE["spec"]["ports"]] == [port["name"]]
    assert int(SERVER["resources"]["limits"]["nvidia.com/gpu"]) == arguments.tp_size
    # Its check needs the GPU that it looks for.
    assert CHECK["resources"] == SERVER["resources"]


def test_selectors_find_the_pods():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert SERVICE["spec"]["selector"].items() <= labels.items()
