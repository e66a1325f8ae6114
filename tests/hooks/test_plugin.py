# SPDX-License-Identifier: Apache-2.0
"""The plugin in a process of SGLang's: for every value of its variable, and where SGLang is not as expected."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sglang
import wrapt
from harness.forked_python import environ_with

from sglang_overlay.hooks import applying, plugin, ray_actors, releases, source_tree
from sglang_overlay.hooks.catalogue import MEASURING, OPTIONS, STREAMING, TELLING
from sglang_overlay.observe.report import read_folder

pytestmark = pytest.mark.every_release

PROLOGUE = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="LOG %(levelname)s %(name)s: %(message)s")
"""
EPILOGUE = """
from sglang.srt.plugins import load_plugins
load_plugins()
assert "sglang.srt.layers.quantization.fp8" not in sys.modules, "the plugin imports SGLang's layers"
from sglang.srt.layers.quantization import fp8
from sglang_overlay.hooks.catalogue import STREAMING
from sglang_overlay.hooks.hook import State, inspect_hooks
import sglang.srt.model_loader.loader
print("ACTIVE", sum(found.state is State.ACTIVE for found in inspect_hooks(STREAMING)), "of", len(STREAMING))
fp8.Fp8Config(is_checkpoint_fp8_serialized=True)
print("SERIALIZED")
for _ in range(2):
    fp8.Fp8Config()
print("ONLINE")
"""
OTHER_RELEASE = """
from sglang_overlay.hooks import releases
releases.installed = lambda: "0.4.1"
"""
NEXT_RELEASE = """
from packaging.version import Version
from sglang_overlay.hooks import releases
version = f"{Version(releases.installed()).base_version}.post9"
releases.installed = lambda: version
"""
NEWER_RELEASE = """
from sglang_overlay.hooks import releases
releases.installed = lambda: "99.1"
"""
NEWER_SIGNATURE = (
    NEWER_RELEASE
    + """
from dataclasses import replace
from sglang_overlay.hooks import catalogue
first, *others = catalogue.STREAMING
catalogue.STREAMING = (replace(first, parameters=("self", "renamed")), *others)
"""
)
NEWER_WITHOUT = NEWER_SIGNATURE.replace(
    'parameters=("self", "renamed")', 'target="sglang.srt.gone", without="A thing."'
)
OTHER_SIGNATURE = """
import wrapt
def change(module):
    module.Fp8LinearMethod.create_weights = lambda self, layer: None
wrapt.register_post_import_hook(change, "sglang.srt.layers.quantization.fp8")
"""
MORE_TO_TAKE = """
import wrapt
def change(module):
    module.Fp8LinearMethod.process_weights_after_loading = lambda self, layer, extra=None: None
wrapt.register_post_import_hook(change, "sglang.srt.layers.quantization.fp8")
"""
RENAMED_REGISTRY = """
import re
from pathlib import Path
from sglang.srt import plugins
from sglang.srt.plugins import hook_registry
source = Path(hook_registry.__file__).read_text()
source = re.sub(r"\\b_(hooks|patched|apply_target|wrap_fn)\\b", r"_\\1_of_new", source)
assert "_hooks_of_new" in source
exec(compile(source, hook_registry.__file__, "exec"), vars(hook_registry))
for name in ("HookRegistry", "HookSource", "_current_plugin_source"):
    setattr(plugins, name, getattr(hook_registry, name))
"""
NO_REGISTRY = """
from sglang.srt import plugins
from sglang.srt.plugins import hook_registry
plugins.HookRegistry = type("Bare", (), {"apply_hooks": staticmethod(lambda: None)})
del hook_registry.HookRegistry, hook_registry.HookType, hook_registry.HookSource
"""
RENAMED_DEPENDENCY = """
sys.modules["sglang_overlay.hooks.update_hooks"] = None
"""
OTHER_PLUGIN = """
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
original = Fp8LinearMethod.create_weights
def replacement(*args, **kwargs):
    return original(*args, **kwargs)
def around(original_fn, *args, **kwargs):
    return original_fn(*args, **kwargs)
target = "sglang.srt.layers.quantization.fp8.Fp8LinearMethod.create_weights"
"""
OTHER_REPLACES = OTHER_PLUGIN + "HookRegistry.register(target, replacement, HookType.REPLACE)"
OTHER_WRAPS = OTHER_PLUGIN + "HookRegistry.register(target, around, HookType.AROUND)"
OTHER_UPDATER = """
import importlib, wrapt
from sglang_overlay.hooks.catalogue import STREAMING
(point,) = (point for point in STREAMING if point.target.endswith(".WeightUpdater.update_weights_from_disk"))
def change(module):
    owner = getattr(module, OWNERS[module.__name__])
    if "update_weights_from_disk" in vars(owner):
        owner.update_weights_from_disk = lambda self: None
OWNERS = {place.module: place.target.split(".")[-2] for place in point.candidates}
for module in OWNERS:
    wrapt.register_post_import_hook(change, module)
"""
LOAD_PLUGINS = """
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.model_executor.model_runner
"""
SLIP = """
from sglang_overlay.hooks import built_in
built_in.streams_itself = lambda: 1 / 0
"""
LOAD = """
from pathlib import Path
from harness.load_series import LoadSeries
model = LoadSeries(Path(sys.argv[1])).load(Path(sys.argv[1]))
print("FP8", model.model.layers[0].mlp.down_proj.weight.dtype)
"""
LOADER = "sglang.srt.model_loader.loader"
FP8_LINEAR = "sglang.srt.layers.quantization.fp8.Fp8LinearMethod.create_weights"
ABSENT = len(releases.absent())
PRESENT = len(STREAMING) - ABSENT


@pytest.fixture(scope="module")
def run(forked_python):
    """A process that loads SGLang's plugins, and then makes an fp8 config as a model load does."""

    def start(change="", then=EPILOGUE, arguments=(), **variables):
        return forked_python.run(PROLOGUE + change + then, arguments, environ_with(**variables))

    return start


def warnings_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("LOG ") and "StreamFP8" in line]


@pytest.mark.parametrize(("value", "active"), [("0", 0), ("1", PRESENT), ("require", PRESENT)])
def test_switch_puts_the_hooks_in_place_or_leaves_sglang_alone(value, active, run):
    result = run(SGLANG_STREAMFP8=value)
    assert result.returncode == 0, result.stderr
    assert f"ACTIVE {active} of {len(STREAMING)}" in result.stdout
    assert warnings_of(result) == []


def test_unknown_value_ends_the_process_with_the_valid_ones(run):
    result = run(SGLANG_STREAMFP8="yes")
    assert result.returncode == 1
    assert "ACTIVE" not in result.stdout
    assert "SGLANG_STREAMFP8='yes' is not a known value" in result.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(OTHER_RELEASE, "SGLang 0.4.1 is not a supported release (supported: 0.5.11", id="release"),
        pytest.param(NEWER_WITHOUT, "sglang.srt.gone: absent (A thing.)", id="newer, without something"),
        pytest.param(NEWER_SIGNATURE, "load_model: signature (expected self, renamed; found self", id="newer, changed"),
        pytest.param(OTHER_SIGNATURE, "Fp8LinearMethod.create_weights: signature", id="signature"),
        pytest.param(MORE_TO_TAKE, "(found self, layer, extra, more than its hook passes on)", id="one more"),
    ],
)
class TestSGLangThatIsNotAsExpected:
    def test_is_left_as_it_is_with_one_warning_at_the_first_fp8_load(self, change, said, run):
        result = run(change)
        assert result.returncode == 0, result.stderr
        assert "Fp8MoEMethod" not in result.stdout
        (warning,) = warnings_of(result)
        assert said in warning
        assert "supported" in warning

    def test_is_an_error_of_the_fp8_load_alone_where_streaming_is_required(self, change, said, run):
        result = run(change, SGLANG_STREAMFP8="require")
        assert result.returncode == 1
        assert "SERIALIZED" in result.stdout
        assert "ONLINE" not in result.stdout
        assert "StreamingUnavailableError: SGLANG_STREAMFP8=require" in result.stderr
        assert said in result.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(RENAMED_DEPENDENCY, "update_hooks", id="a module that cannot be imported"),
        pytest.param(SLIP, "ZeroDivisionError", id="slip"),
    ],
)
class TestHooksThatCannotBeApplied:
    def test_are_said_and_fp8_loads_are_stocks(self, change, said, run):
        result = run(change, SGLANG_STREAMFP8="1")
        assert result.returncode == 0, result.stderr
        assert "ONLINE" in result.stdout
        assert said in result.stderr

    def test_end_what_requires_streaming(self, change, said, run):
        result = run(change, SGLANG_STREAMFP8="require")
        assert result.returncode == 1
        assert "ONLINE" not in result.stdout
        assert "SGLANG_STREAMFP8=require" in result.stderr
        assert said in result.stderr


@pytest.fixture
def load(run, checkpoint):
    """Loads a tiny checkpoint in a process of which something is changed."""

    def start(change, *folders, **variables):
        path = [*folders, Path(__file__).parents[2] / "ci", Path(__file__).parents[1], os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(map(str, path))
        return run(change, LOAD_PLUGINS + LOAD, [checkpoint("qwen3")], PYTHONPATH=path, **variables)

    return start


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(OTHER_UPDATER, "update_weights_from_disk: signature", id="updater"),
        pytest.param(OTHER_REPLACES, "another plugin has replaced " + FP8_LINEAR, id="replaced by another plugin"),
    ],
)
class TestHooksOfWhichOthersAreInPlace:
    """What is loaded must not be streamed all the same, and said not to be."""

    def test_load_is_stocks_with_one_warning(self, change, said, tmp_path, load):
        result = load(change, SGLANG_STREAMFP8_REPORT=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert "FP8 torch.float8_e4m3fn" in result.stdout
        (warning,) = warnings_of(result)
        assert said in warning
        assert "The model is loaded as in stock SGLang." in warning
        assert {(report.mode, report.units.streamed) for report in read_folder(tmp_path)} == {("stock", 0)}

    def test_load_is_an_error_where_streaming_is_required(self, change, said, load):
        result = load(change, SGLANG_STREAMFP8="require")
        assert result.returncode == 1
        assert "StreamingUnavailableError: SGLANG_STREAMFP8=require" in result.stderr


@pytest.mark.parametrize("change", [RENAMED_REGISTRY, NO_REGISTRY], ids=["renamed", "gone"])
def test_private_names_of_sglangs_own_hook_registry_are_not_needed(change, run):
    result = run(change, SGLANG_STREAMFP8="require")
    assert result.returncode == 0, result.stderr
    assert f"ACTIVE {PRESENT} of {len(STREAMING)}" in result.stdout


def test_function_that_another_plugin_wraps_as_well_is_streamed(load):
    result = load(OTHER_WRAPS, SGLANG_STREAMFP8="require")
    assert result.returncode == 0, result.stderr
    assert "FP8 torch.float8_e4m3fn" in result.stdout


SEEN = """
from sglang.srt.plugins import load_plugins
load_plugins()
import pkgutil
from sglang_overlay.hooks.catalogue import OPTIONS, STREAMING, TELLING
for target in sorted({place.target for point in (*STREAMING, *OPTIONS, *TELLING) for place in point.candidates}):
    try:
        code = pkgutil.resolve_name(target).__code__
    except (ImportError, AttributeError):
        continue
    print("SEEN", target, code.co_filename, code.co_firstlineno)
"""


@pytest.fixture(scope="module")
def functions(run):
    """Where each function that is hooked, or would be, stands in a file."""

    def find(**variables):
        result = run(then=SEEN, **variables)
        assert result.returncode == 0, result.stderr
        return {line for line in result.stdout.splitlines() if line.startswith("SEEN ")}

    return find


@pytest.fixture(scope="module")
def stock(functions):
    # Without the reference platform 0.5.11's scheduler cannot be imported where there is no GPU.
    return functions(SGLANG_PLUGINS="streamfp8_cpu_reference,streamfp8_cpu")


class TestSwitchedOff:
    """``SGLANG_STREAMFP8=0``: every function that is hooked otherwise is the one that stands in SGLang's file."""

    def test_nothing_is_hooked(self, stock, functions):
        assert functions(SGLANG_STREAMFP8="0") == stock
        assert len(stock) >= PRESENT

    def test_report_that_is_asked_for_hooks_what_measures_a_load_and_nothing_else(self, stock, tmp_path, functions):
        found = functions(SGLANG_STREAMFP8="0", SGLANG_STREAMFP8_REPORT=str(tmp_path))
        changed = {line.split()[1] for line in stock - found}
        measuring = {place.target for point in (*MEASURING, *TELLING) for place in point.candidates}
        assert f"{LOADER}.DefaultModelLoader.load_model" in changed
        assert changed <= measuring


class TestReleaseThatIsNotSupported:
    """It comes after the one that is installed, and is like it."""

    def test_has_its_hooks_in_place(self, run):
        result = run(NEXT_RELEASE, SGLANG_STREAMFP8="require")
        assert result.returncode == 0, result.stderr
        assert f"ACTIVE {PRESENT} of {len(STREAMING)}" in result.stdout
        assert warnings_of(result) == []

    def test_is_streamed_with_nothing_said_where_all_bodies_are_known(self, load):
        result = load(NEXT_RELEASE, SGLANG_STREAMFP8="require")
        assert result.returncode == 0, result.stderr
        assert "FP8 torch.float8_e4m3fn" in result.stdout
        assert warnings_of(result) == []


@pytest.fixture(scope="module")
def changed_sglang(tmp_path_factory):
    """The folder of an SGLang in which a function that is hooked has a statement more than in any release."""
    installed, folder = Path(sglang.__file__).parent, tmp_path_factory.mktemp("changed")
    shutil.copytree(installed, folder / "sglang", copy_function=os.symlink)
    first = source_tree.find(installed.parent, FP8_LINEAR).node.body[0]
    file = folder / "sglang" / "srt" / "layers" / "quantization" / "fp8.py"
    lines = file.read_text().splitlines(keepends=True)
    lines.insert(first.lineno - 1, f"{' ' * first.col_offset}something_else = None\n")
    file.unlink()
    file.write_text("".join(lines))
    return folder


class TestFunctionThatDoesSomethingElse:
    def test_is_streamed_with_a_warning_that_names_it(self, changed_sglang, load):
        result = load("", changed_sglang)
        assert result.returncode == 0, result.stderr
        assert "FP8 torch.float8_e4m3fn" in result.stdout
        (warning,) = warnings_of(result)
        assert f"SGLang {releases.installed()} is untested" in warning
        assert re.findall(r"sglang\.srt\S+\w", warning) == [FP8_LINEAR]

    def test_is_an_error_where_streaming_is_required(self, changed_sglang, load):
        result = load("", changed_sglang, SGLANG_STREAMFP8="require")
        assert result.returncode == 1
        assert "FP8" not in result.stdout
        assert "StreamingUnavailableError: SGLANG_STREAMFP8=require" in result.stderr
        assert FP8_LINEAR in result.stderr


CHANGED_METRICS = """
from dataclasses import replace
from sglang_overlay.hooks import catalogue
catalogue.TELLING = tuple(replace(point, parameters=("self", "renamed")) for point in catalogue.TELLING)
"""
TOLD = """
import sglang.srt.managers.scheduler
from sglang_overlay.hooks.catalogue import TELLING
print("TELLING", *(found.state.value for found in inspect_hooks(TELLING)))
"""


class TestMetricsOfSGLang:
    def test_are_added_to(self, run):
        result = run(then=EPILOGUE + TOLD)
        assert "TELLING active active active active" in result.stdout, result.stderr

    def test_that_are_not_as_expected_keep_nothing_from_streaming(self, run):
        result = run(CHANGED_METRICS, then=EPILOGUE + TOLD, SGLANG_STREAMFP8="require")
        assert "TELLING signature signature signature signature" in result.stdout, result.stderr
        assert f"ACTIVE {PRESENT} of {len(STREAMING)}" in result.stdout
        assert warnings_of(result) == []


DISCOVERY = """
import sys
before = set(sys.modules)
from sglang_overlay.hooks.plugin import activate
import sglang_overlay.cpu_reference.plugin
activate()
print(*sorted(set(sys.modules) - before))
"""


def test_discovery_imports_nothing_of_sglangs_or_torchs_and_little_of_this_package():
    """Every process of SGLang's pays for it, and most of them load no fp8 model."""
    command = [sys.executable, "-c", DISCOVERY]
    imported = subprocess.run(command, env=environ_with(), capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in imported if name.partition(".")[0] in ("sglang", "torch", "numpy", "wrapt", "click")]
    assert {name for name in imported if name.startswith("sglang_overlay")} == {
        "sglang_overlay",
        "sglang_overlay.cpu_reference",
        "sglang_overlay.cpu_reference.plugin",
        "sglang_overlay.hooks",
        "sglang_overlay.hooks.plugin",
    }


def test_hook_that_fails_is_said_and_the_import_goes_on():
    said = []
    applying.when_imported("sys", lambda _module: 1 / 0, said.append)
    assert said == ["hooks of sys could not be put in place (ZeroDivisionError: division by zero)"]


def test_everything_that_is_patched_wakes_the_plugin():
    catalogued = {module for point in (*STREAMING, *OPTIONS, *TELLING) for module in point.modules}
    assert {*catalogued, ray_actors.DRIVER_MODULE} == plugin.PATCHED_MODULES


class TestFirstImport:
    @pytest.fixture
    def calls(self, tmp_path, monkeypatch):
        (tmp_path / "streamfp8_first.py").write_text("")
        (tmp_path / "streamfp8_second.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
        yield []
        for name in ("streamfp8_first", "streamfp8_second"):
            sys.modules.pop(name, None)

    def test_calls_once_before_the_module_is_imported(self, calls):
        modules = frozenset({"streamfp8_first", "streamfp8_second"})
        sys.meta_path.insert(0, plugin.FirstImport(modules, lambda: calls.append("streamfp8_first" in sys.modules)))
        importlib.import_module("streamfp8_first")
        importlib.import_module("streamfp8_second")
        assert calls == [False]

    def test_hook_that_is_registered_then_sees_that_very_import(self, calls):
        def register():
            wrapt.register_post_import_hook(lambda module: calls.append(module.__name__), "streamfp8_first")

        sys.meta_path.insert(0, plugin.FirstImport(frozenset({"streamfp8_first"}), register))
        importlib.import_module("streamfp8_first")
        assert calls == ["streamfp8_first"]

    def test_failure_is_logged_and_the_import_goes_on(self, calls, caplog):
        sys.meta_path.insert(0, plugin.FirstImport(frozenset({"streamfp8_first"}), lambda: 1 / 0))
        assert importlib.import_module("streamfp8_first").__name__ == "streamfp8_first"
        assert "fp8 loads are stock's" in caplog.text
