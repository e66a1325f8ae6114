"""Packaging of sglang-streamfp8; tool configuration is in pyproject.toml."""

import gzip
import json
import os
import shutil
import tarfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
RELEASES = json.loads((ROOT / "sglang_overlay" / "hooks" / "releases.json").read_text(encoding="utf-8"))["supported"]

# torch is left out on purpose: SGLang pins the build it was compiled for, and a second pin here could only replace it.
RUNTIME = [
    "click>=8.1",
    "jinja2>=3.1",
    "packaging>=23",
    "psutil>=5.9",
    "rich>=13",
    "tqdm>=4.66",
    "wrapt>=1.16",
]
CHART = ["matplotlib>=3.8"]
TEST = [
    "httpx>=0.27",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "openai>=1.50",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
]
DEV = [
    "mypy>=1.15",
    "ruff>=0.11",
    "types-jsonschema",
    "types-psutil",
    "types-tqdm",
]


class BuildWithPatches(build_py):
    """The patch series lie beside the package in a clone, and in it where it is installed."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for series in (ROOT / "patches").glob("*/series"):
            target = Path(self.build_lib, "sglang_overlay", "patch_series", series.parent.name)
            shutil.copytree(series.parent, target, dirs_exist_ok=True)


class ReproducibleSdist(sdist):
    """With ``SOURCE_DATE_EPOCH`` set, the same files give the same archive: one order, time, owner and set of modes."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):  # noqa: A002
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        target = Path(f"{base_name}.tar.gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        root = Path(root_dir or ".")
        with (
            target.open("wb") as raw,
            gzip.GzipFile("", "wb", mtime=int(epoch), fileobj=raw) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for file in sorted(path for path in (root / base_dir).rglob("*") if path.is_file()):
                name = file.relative_to(root).as_posix()
                archive.add(file, name, filter=lambda member: _anonymous(member, int(epoch)))
        return str(target)


def _anonymous(member: tarfile.TarInfo, time: int) -> tarfile.TarInfo:
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
    return member


setup(
    name="sglang-streamfp8",
    version="0.1.0",
    description="Load bf16 checkpoints into SGLang as FP8, tensor by tensor, within the FP8 model's own memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The sglang-streamfp8 contributors",
    project_urls={
        "SGLang": "https://github.com/sgl-project/sglang",
        "The problem, upstream": "https://github.com/sgl-project/sglang/issues/2895",
        "Work on it, upstream": "https://github.com/sgl-project/sglang/pull/17945",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["sglang", "fp8", "quantization", "llm", "inference", "serving", "memory", "model loading", "moe"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Plugins",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["sglang_overlay", "sglang_overlay.*"]),
    package_data={"sglang_overlay": ["py.typed", "**/*.json", "**/*.j2"]},
    cmdclass={"build_py": BuildWithPatches, "sdist": ReproducibleSdist},
    install_requires=RUNTIME,
    extras_require={
        "chart": CHART,
        "dev": DEV + TEST + CHART,
        "sglang": [f"sglang=={RELEASES[-1]['release']}"],
        "test": TEST + CHART,
    },
    entry_points={
        "console_scripts": ["sglang-streamfp8 = sglang_overlay.cli:main"],
        "sglang.srt.platforms": [
            "streamfp8_cpu = sglang_overlay.cpu_reference.plugin:platform",
        ],
        "sglang.srt.plugins": [
            "streamfp8 = sglang_overlay.hooks.plugin:activate",
            "streamfp8_cpu_reference = sglang_overlay.cpu_reference.plugin:activate",
        ],
    },
)
