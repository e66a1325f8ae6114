"""The patch series that adds streaming to SGLang itself: the contents of each patch, and their text.

The core and a few modules more are the overlay's own, with renamed imports. What an SGLang with streaming built in does
in its own way (a load, stock's layers, the switch, GPU tests, documentation) is in `patches/upstream`, with the layout
of SGLang's repository. SGLang's own files get a decorator at each hook (`edits.py`).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_overlay.hooks.built_in import PACKAGE
from sglang_overlay.hooks.catalogue import STREAMING
from workbench.releases.edits import EditError, EnvironmentField, HookEdit, edited
from workbench.releases.environment import CLONE

PACKAGE_FOLDER = f"python/{PACKAGE.replace('.', '/')}"
UNIT_TESTS = "test/registered/unit/model_loader"
SOURCES = CLONE / "patches" / "upstream"
MESSAGES = CLONE / "patches" / "messages"
ENVIRONMENT = "python/sglang/srt/environ.py"
LINE_LENGTH = 88


@dataclass(frozen=True)
class Patch:
    """One step of the series.

    Attributes:
        number: from 1; `patches/messages` has the commit message with this number.
        modules: modules of the overlay, by folder and name; in the series they are in one folder.
        files: files that it takes from `patches/upstream`.
        tests: names of files in `tests/core`, and what they become.
        switches: environment variables that it adds.
    """

    number: int
    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tests: Mapping[str, str] | None = None
    switches: tuple[EnvironmentField, ...] = ()


PATCHES = (
    Patch(
        1,
        modules=(
            "core/capture",
            "core/captured_views",
            "core/errors",
            "core/executor",
            "core/layer",
            "core/loader_calls",
            "core/mapped_files",
            "core/placeholders",
            "core/quantizers",
            "core/regions",
            "core/shortage",
            "core/sources",
            "core/staging",
            "core/stream",
            "core/units",
        ),
        files=(f"{PACKAGE_FOLDER}/__init__.py",),
        tests={
            "streams.py": f"{UNIT_TESTS}/streaming_fp8_builders.py",
            "test_layer.py": f"{UNIT_TESTS}/test_streaming_fp8_layer.py",
            "test_stream.py": f"{UNIT_TESTS}/test_streaming_fp8_stream.py",
        },
    ),
    Patch(
        2,
        modules=(
            "load/eligibility",
            "schemes/capabilities",
        ),
        files=(
            f"{PACKAGE_FOLDER}/entry.py",
            f"{PACKAGE_FOLDER}/hooks.py",
            f"{PACKAGE_FOLDER}/layer_plan.py",
            f"{PACKAGE_FOLDER}/linear_method.py",
            f"{PACKAGE_FOLDER}/model_load.py",
            f"{PACKAGE_FOLDER}/model_loading.py",
            f"{PACKAGE_FOLDER}/stock_linear.py",
            "test/registered/quant/test_streaming_fp8.py",
        ),
        switches=(
            EnvironmentField(
                "SGLANG_STREAMFP8",
                "EnvBool(True)",
                ("--quantization fp8 over a high-precision checkpoint: quantize while it is read.",),
            ),
        ),
    ),
    Patch(
        3,
        files=(
            f"{PACKAGE_FOLDER}/experts_method.py",
            f"{PACKAGE_FOLDER}/stock_experts.py",
            "test/registered/quant/test_streaming_fp8_moe.py",
        ),
    ),
    Patch(
        4,
        modules=("core/tensor_names", "load/checkpoint_files", "load/diagnostics"),
        files=(f"{PACKAGE_FOLDER}/checked_entry.py", f"{PACKAGE_FOLDER}/checkpoint_watch.py"),
        tests={"test_tensor_names.py": f"{UNIT_TESTS}/test_streaming_fp8_tensor_names.py"},
        switches=(
            EnvironmentField(
                "SGLANG_STREAMFP8_ALLOW_MISSING",
                "EnvBool(False)",
                ("Serve zeros where the checkpoint lacks a weight that is streamed.",),
            ),
        ),
    ),
    Patch(5, files=("docs_new/docs/advanced_features/streaming_fp8.mdx",)),
)


def commits(release: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each patch's commit message, and the files it leaves, changed ones only, by their paths in SGLang's repository.

    Args:
        release: folder that contains the release's `sglang` package.

    Raises:
        EditError: the release lacks a place for an edit.
    """
    formatted = _formatted({path: text for patch in PATCHES for path, text in _added(patch).items()})
    for patch in PATCHES:
        files = {path: formatted[path] for path in _added(patch)}
        files.update(_changed(release, patch.number))
        message = (MESSAGES / f"{patch.number}.txt").read_text(encoding="utf-8")
        yield message, files


def touched(release: Path) -> dict[str, str]:
    """The release's own files that the series changes, in their original form."""
    return {path: _original(release, path) for path in _changed(release, len(PATCHES))}


def _added(patch: Patch) -> dict[str, str]:
    """New files of a patch, before they are formatted in upstream's style."""
    files = {path: (SOURCES / path).read_text(encoding="utf-8") for path in patch.files}
    for module in patch.modules:
        source = Path("sglang_overlay", f"{module}.py")
        files[f"{PACKAGE_FOLDER}/{source.name}"] = _renamed(source)
    for name, path in (patch.tests or {}).items():
        files[path] = _as_registered_test(name, _renamed(Path("tests", "core", name)))
    return files


def _renamed(source: Path) -> str:
    """A module of the overlay with imports renamed for the series' package."""
    text = (CLONE / source).read_text(encoding="utf-8")
    text = re.sub(r"\bsglang_overlay\.(core|load|schemes)\b", PACKAGE, text)
    text = re.sub(r"  # (type: ignore|noqa)\b.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *# -- .* -+$", lambda rule: rule[0][:LINE_LENGTH], text, flags=re.MULTILINE)
    left = re.search(r"\bsglang_overlay\b.*|^from core\b(?!\.streams import).*", text, flags=re.MULTILINE)
    if left is not None:
        raise EditError(f"{source} needs what the series does not have: {left[0]}")
    licence, _, rest = text.partition("\n")
    return f"{licence}\n# Generated by sglang-streamfp8 (ci/make_patches) from {source.as_posix()}.\n{rest}"


def _as_registered_test(name: str, text: str) -> str:
    """A test of the core in the form that upstream's CI runs: registered, and executable by itself."""
    text = text.replace("from core.streams import", "from streaming_fp8_builders import")
    if not name.startswith("test_"):
        return text
    head = "from __future__ import annotations\n"
    registered = (
        "\nfrom sglang.test.ci.ci_register import register_cpu_ci\n\n"
        'register_cpu_ci(est_time=10, suite="base-b-test-cpu")\n\nimport sys\n'
    )
    run = '\n\nif __name__ == "__main__":\n    sys.exit(pytest.main([__file__]))\n'
    start, _, rest = text.partition(head)
    imports = "" if re.search(r"^import pytest$", rest, flags=re.MULTILINE) else "import pytest\n"
    return f"{start}{head}{registered}{imports}{rest.rstrip()}\n{run}"


def _formatted(files: Mapping[str, str]) -> dict[str, str]:
    """Files formatted in upstream's style: black's layout and isort's order."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in files.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        style = ["--isolated", "--quiet", "--no-cache"]
        first_party = 'lint.isort.known-first-party=["sglang"]'
        _ruff("check", *style, "--select", "I", "--fix", "--config", first_party, folder)
        _ruff("format", *style, "--line-length", str(LINE_LENGTH), folder)
        return {path: Path(folder, path).read_text(encoding="utf-8") for path in files}


def _ruff(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ruff", *arguments], check=True)


def _changed(release: Path, upto: int) -> dict[str, str]:
    """The release's files that patches up to this one have changed, in their form after it."""
    hooks: dict[str, dict[str, HookEdit]] = {}
    for hook in STREAMING:
        for built_in in hook.built_in:
            if built_in.patch <= upto:
                path = f"python/{hook.module.replace('.', '/')}.py"
                name = hook.target.removeprefix(f"{hook.module}.")
                hooks.setdefault(path, {})[name] = HookEdit(name, built_in.wrapper)
    changed = {
        path: edited(_original(release, path), list(named.values()), f"{PACKAGE}.hooks", path)
        for path, named in hooks.items()
    }
    switches = [switch for patch in PATCHES if patch.number <= upto for switch in patch.switches]
    if switches:
        changed[ENVIRONMENT] = edited(_original(release, ENVIRONMENT), switches, "", ENVIRONMENT)
    return changed


def _original(release: Path, path: str) -> str:
    return (release / Path(path).relative_to("python")).read_text(encoding="utf-8")
