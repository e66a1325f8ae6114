# SPDX-License-Identifier: Apache-2.0
"""Which wheels are collected, what is left of sglang-kernel's, and that the result can be installed."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from workbench import environment, gpu_wheels, pieces
from workbench.environment import EnvironmentSetupError
from workbench.gpu_wheels import Wanted
from workbench.wheel_files import trimmed

NAME = "sglang_kernel-0.4.10"
INFORMATION = f"{NAME}.dist-info"


def make_wheel(folder: Path, name: str, files: dict[str, str], tag: str = "py3-none-any") -> Path:
    """A valid wheel of these files."""
    package, version = name.split("-")
    files = {
        **files,
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        f"{name}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    rows = [f"{path},sha256={digest(content.encode())},{len(content)}" for path, content in files.items()]
    files[f"{name}.dist-info/RECORD"] = "\n".join([*rows, f"{name}.dist-info/RECORD,,", ""])
    wheel = folder / f"{name}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@pytest.fixture
def kernels(tmp_path):
    """A wheel laid out as sglang-kernel's."""
    compiled = {f"sgl_kernel/{name}": "machine code" for name in ("flash_ops.so", "sm90/ops.so", "sm100/ops.so")}
    return make_wheel(tmp_path, NAME, {"sgl_kernel/__init__.py": "answer = 42\n", **compiled})


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture
def left(kernels):
    return trimmed(kernels, gpu_wheels._is_wanted_kernel, "1sm90")


def test_of_the_kernels_python_files_and_one_generation_are_left(kernels, left):
    code = {name for name in names_in(left) if not name.startswith(INFORMATION)}
    assert code == {"sgl_kernel/__init__.py", "sgl_kernel/sm90/ops.so"}
    assert left.name == f"{NAME}-1sm90-py3-none-any.whl"
    assert not kernels.exists()


def test_record_of_a_trimmed_wheel_is_of_what_it_holds(left):
    with zipfile.ZipFile(left) as archive:
        record = archive.read(f"{INFORMATION}/RECORD").decode()
        rows = {path: (checksum, size) for path, checksum, size in csv.reader(record.splitlines())}
        assert rows.pop(f"{INFORMATION}/RECORD") == ("", "")
        assert rows.keys() == names_in(left) - {f"{INFORMATION}/RECORD"}
        for path, (checksum, size) in rows.items():
            content = archive.read(path)
            assert (checksum, size) == (f"sha256={digest(content)}", str(len(content)))


def test_trimmed_wheel_installs_and_says_that_it_is_not_the_published_one(left, tmp_path):
    target = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", target], check=True)
    python = str(environment.interpreter(target))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", left], check=True)
    question = "import sgl_kernel; print(sgl_kernel.answer)"
    assert subprocess.run([python, "-c", question], capture_output=True, text=True, check=True).stdout == "42\n"
    assert b"\nBuild: 1sm90\n" in zipfile.ZipFile(left).read(f"{INFORMATION}/WHEEL")


def wanted(release: str, *without: str) -> Wanted:
    plan = dataclasses.replace(environment.planned(release, "gpu"), clone=environment.CLONE)
    return Wanted(plan, "3.12", without)


@pytest.mark.parametrize("release", environment.supported())
def test_no_release_asks_for_what_the_machine_has(release):
    asked = {environment.normalized(row["name"]) for row in gpu_wheels._ROW.finditer(wanted(release).requirements)}
    assert {"sglang", "sglang-kernel", "transformers", "safetensors", "numpy", "setuptools", "rich", "click"} <= asked
    assert not asked & {"torch", "torchvision", "triton", "nvidia-cublas", "nvidia-nccl-cu13", "flash-attn-4"}


def test_a_package_that_the_machine_has_can_be_left_out():
    newest = environment.supported()[-1]
    assert "\nscipy==" in wanted(newest).requirements
    assert "\nscipy==" not in wanted(newest, "SciPy").requirements


def test_release_is_the_newest_that_is_made_for_the_machines_torch():
    assert gpu_wheels.release_for("2.11.0+cu130") == "0.5.17"
    with pytest.raises(EnvironmentSetupError, match=r"made for torch 1\.0; there are: 2\.11\.0,"):
        gpu_wheels.release_for("1.0")


def test_what_is_collected_is_packed_with_what_it_is_for(tmp_path, monkeypatch):
    def download(_: Wanted, folder: Path) -> None:
        make_wheel(folder, "other-1.0", {"other.py": ""})
        make_wheel(folder, "flashinfer_python-0.7.2", {"flashinfer/__init__.py": "", "flashinfer/data/a.py": "x"})
        make_wheel(folder, NAME, {"sgl_kernel/__init__.py": "", "sgl_kernel/sm100/ops.so": "x" * 10_000})

    monkeypatch.setattr(gpu_wheels, "_download", download)
    manifest = gpu_wheels.collect(wanted("0.5.23"), tmp_path / "out", 3_000)
    facts = manifest.facts
    assert (facts["release"], facts["python"], facts["torch"]) == ("0.5.23", "3.12", "2.14.1")
    assert {"torch", "tilelang"} <= set(facts["left_out"])
    files = pieces.unpack(tmp_path / "out", tmp_path / "unpacked")
    assert [file.name for file in files] == [
        "flashinfer_python-0.7.2-1sm90-py3-none-any.whl",
        "other-1.0-py3-none-any.whl",
        f"{NAME}-1sm90-py3-none-any.whl",
    ]
    assert [name for name in names_in(files[0]) if not name.startswith("flashinfer_python")] == [
        "flashinfer/__init__.py"
    ]
    assert len(manifest.pieces) > 1
    assert "for Python 3.12" in next(iter(gpu_wheels.described(manifest)))


def test_a_folder_that_is_there_is_not_overwritten(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_wheels.main(["--out", str(tmp_path)])
    assert "is there already" in capsys.readouterr().err


def test_failure_leaves_no_half_folder(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise EnvironmentSetupError("no index")

    monkeypatch.setattr(gpu_wheels, "_download", fail)
    assert gpu_wheels.main(["--out", str(tmp_path / "out")]) == 1
    assert "no index" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
