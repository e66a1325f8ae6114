# SPDX-License-Identifier: Apache-2.0
"""What is published: the same bytes whoever builds it, and what an index needs to know."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import sglang_overlay
from sglang_overlay.hooks import releases

ROOT = Path(__file__).parents[1]
EPOCH = 1_700_000_000
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def build_sdist(folder: Path, umask: int, touched: int) -> Path:
    """Build in a copy of the project whose files have other times and permissions."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for file in (path for path in tree.rglob("*") if path.is_file()):
        file.chmod(file.stat().st_mode & ~umask)
        os.utime(file, (touched, touched))
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=tree,
        env=environment,
        umask=umask,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    cases = ((0o022, EPOCH - 1000), (0o077, EPOCH + 1000))
    return [build_sdist(tmp_path_factory.mktemp("sdist"), *case) for case in cases]


def test_sdist_is_the_same_wherever_it_is_built(archives):
    first, second = archives
    assert first.read_bytes() == second.read_bytes()


def test_sdist_holds_what_is_needed_to_build_from_it_and_names_nobody(archives):
    with tarfile.open(archives[0]) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {"setup.py", "README.md", "LICENSE", "sglang_overlay/py.typed", "patches/0.5.23/series"} <= names
    assert {(member.uid, member.gid, member.uname, member.gname, member.mtime) for member in members} == {
        (0, 0, "", "", EPOCH)
    }


def test_metadata_names_the_pythons_that_are_tested(archives):
    with tarfile.open(archives[0]) as archive:
        (name,) = [name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO")]
        stated = email.message_from_bytes(archive.extractfile(name).read())
    pythons = [line.rsplit(" ", 1)[-1] for line in stated.get_all("Classifier") if "Python :: 3." in line]
    nightly = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    (job,) = re.findall(r"^  test:\n(.*?)^  \w", nightly, re.DOTALL | re.MULTILINE)
    assert pythons == re.findall(r'python: \[?"([\d.]+)"', job)
    assert stated["Requires-Python"] == f">={pythons[0]}"
    assert "Typing :: Typed" in stated.get_all("Classifier")
    assert stated["Version"] == sglang_overlay.__version__ == metadata.version("sglang-streamfp8")


def test_wheel_installs_and_its_command_runs(archives, tmp_path):
    """Without an index, beside the packages that are here already, as `pip install` does it."""
    shutil.unpack_archive(archives[0], tmp_path)
    (tree,) = tmp_path.iterdir()
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    # Isolated, or pip finds a clone on PYTHONPATH installed already.
    pip = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": metadata.distribution("click").locate_file("").as_posix()}
    place = (
        "import sglang_overlay, sglang_overlay.patches as p; print(sglang_overlay.__file__, p.files_of('0.5.23')[0])"
    )
    page = "import pathlib, sglang_overlay as s; print(*pathlib.Path(s.__file__).parent.glob('observe/*.j2'))"
    for code, expected in (
        (["-m", "sglang_overlay", "--version"], "sglang-streamfp8"),
        (["-c", place], "patch_series"),
        (["-c", page], "page.html.j2"),
        ([str(python.with_name("sglang-streamfp8")), "--version"], "sglang-streamfp8"),
    ):
        done = subprocess.run(
            [str(python), *code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
        assert expected in done.stdout


def test_extra_brings_the_newest_supported_release():
    wanted = [line for line in metadata.requires("sglang-streamfp8") if "extra == 'sglang'" in line.replace('"', "'")]
    assert [line.partition(";")[0].strip() for line in wanted] == [f"sglang=={releases.supported()[-1]}"]
