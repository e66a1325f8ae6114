import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

import pytest
from click.testing import CliRunner
from harness.forked_python import environ_with
from reports import STOCK_LOAD, STREAMED_LOAD
from rich.console import Console

import sglang_overlay
from sglang_overlay.activation import NOTES
from sglang_overlay.cli import main
from sglang_overlay.hooks import launch
from sglang_overlay.observe import terminal
from sglang_overlay.observe.folders import Group
from sglang_overlay.observe.report import (
    SCHEMA_FILE,
    LayerCounts,
    LayerNote,
    ParallelRank,
    Ranks,
    StagingUsage,
    UnitCounts,
    write,
)
from sglang_overlay.settings import CPU_REFERENCE_VARIABLE, MODE_VARIABLE

ROOT = Path(sglang_overlay.__file__).parents[1]
STREAMING = replace(
    STREAMED_LOAD,
    units=UnitCounts(1234, 1000),
    staging=StagingUsage(3_100_000),
    layers=LayerCounts(
        210,
        deferred=tuple(LayerNote(f"layers.{index}.kv_b_proj", "MLA absorbs it") for index in range(61)),
        fallback=(LayerNote("layers.7.packed", "[packed] in __init__"),),
    ),
    warnings=("layer layers.7.packed takes stock's path",),
)


@pytest.fixture
def folders(tmp_path):
    """A folder of stock loads and one of streaming loads, two ranks each."""
    for name, load in (("stock", STOCK_LOAD), ("streaming", STREAMING)):
        for tp in (0, 1):
            write(replace(load, ranks=Ranks(tp=ParallelRank(tp, 2))), tmp_path / name)
    return str(tmp_path / "stock"), str(tmp_path / "streaming")


def _run(*arguments: str):
    return CliRunner().invoke(main, arguments)


def _row(output: str, start: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", line.strip())


def test_report_shows_a_row_for_each_rank(folders):
    result = _run("report", folders[1])
    assert result.exit_code == 0, result.output
    assert "moe-1b, SGLang 0.5.23" in result.output
    expected = ["streaming", "6.0 s", "+1.38 GB", "1.25 GB", "1.10x", "3.10 MB", "1234", "210", "61", "1"]
    assert _row(result.output, "TP0/2") == ["TP0/2", *expected]
    assert _row(result.output, "TP1/2") == ["TP1/2", *expected]


def test_report_groups_layers_by_reason_and_repeats_warnings_once(folders):
    output = _run("report", folders[1]).output
    assert output.count("MLA absorbs it") == 1
    assert (
        "deferred  61 layers: MLA absorbs it (layers.0.kv_b_proj, layers.1.kv_b_proj, layers.2.kv_b_proj, ...)"
        in output
    )
    assert "fell back  1 layer: [packed] in __init__ (layers.7.packed)" in output
    assert output.count("warning  layer layers.7.packed takes stock's path") == 1


def test_stock_rows_claim_nothing_about_units(folders):
    assert _row(_run("report", folders[0]).output, "TP0/2")[-5:] == ["-"] * 5


@pytest.mark.parametrize("order", [1, -1])
def test_two_folders_are_compared_with_stock_as_the_base(folders, order):
    first, second = folders[::order]
    output = _run("report", first, second).output
    comparison = output[output.index(f"{folders[1]} against {folders[0]}") :]
    assert _row(comparison, "TP1/2") == ["TP1/2", "6.0 s / 10.0 s", "0.60x", "1.38 GB / 2.50 GB", "0.55x"]


def test_report_as_json(folders):
    result = _run("report", *folders, "--json")
    data = json.loads(result.output)
    assert [folder["folder"] for folder in data["folders"]] == list(folders)
    assert (data["schema"], data["version"]) == ("sglang-streamfp8/reports", 1)
    assert data["folders"][1]["reports"][0]["units"] == {"streamed": 1234, "direct": 1000}
    assert data["comparison"][1]["ranks"]["tp"] == {"rank": 1, "size": 2}
    assert data["comparison"][1]["peak_ratio"] == pytest.approx(0.55)


@pytest.fixture
def fleet(folders, tmp_path):
    """Pods with long names below one folder; the last one is slow."""
    for index, seconds in enumerate((6.0, 6.1, 60.0)):
        load = replace(STREAMING, seconds=seconds, node=f"node-{index}")
        write(load, tmp_path / "fleet" / f"qwen3-moe-235b-a22b-deployment-7c9f9d9c8b-x2x4{index}")
    return str(tmp_path / "fleet")


def test_fleet_is_one_table_and_what_differs_comes_first(fleet):
    result = _run("report", fleet)
    assert result.exit_code == 0, result.output
    title, first, *table = result.output.splitlines()
    assert title == f"{fleet}: moe-1b, SGLang 0.5.23"
    assert first == "  differs  slowest: qwen3-moe-235b-a22b-deployment-7c9f9d9c8b-x2x42 TP0/1, 60.0 s; median 6.1 s"
    assert [line.count("+1.38 GB") for line in table].count(1) == 3
    assert "…" not in result.output


def test_folders_of_a_fleet_are_shown_together_and_two_are_compared(fleet, folders):
    pods = sorted(map(str, Path(fleet).iterdir()))
    assert "against" not in _run("report", *pods).output
    compared = _run("report", *pods[1:]).output
    assert f"{pods[2]} against {pods[1]}" in re.sub(r"\s+", " ", compared)


def test_report_as_lines_has_one_for_each_load(fleet, folders):
    result = _run("report", fleet, "--jsonl")
    found = [json.loads(line) for line in result.output.splitlines()]
    assert [(line["seconds"], line["node"]) for line in found] == [(6.0, "node-0"), (6.1, "node-1"), (60.0, "node-2")]
    assert len({line["folder"] for line in found}) == 3
    assert len(_run("report", *folders, "--jsonl").output.splitlines()) == 4
    assert _run("report", fleet, "--jsonl", "--json").exit_code == 2


def test_report_as_json_says_what_differs_and_where_reports_lie(fleet):
    (folder,) = json.loads(_run("report", fleet, "--json").output)["folders"]
    assert folder["differences"][0].startswith("slowest: ")
    assert folder["reports"][0]["folder"].startswith(f"{fleet}/")


def test_report_draws_a_chart_and_says_where(folders, tmp_path):
    png = tmp_path / "memory.png"
    result = _run("report", *folders, "--png", str(png))
    assert str(png) in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


def test_chart_beside_json_leaves_the_json_clean(folders, tmp_path):
    result = _run("report", *folders, "--json", "--png", str(tmp_path / "memory.png"))
    assert json.loads(result.stdout)["folders"]
    assert (tmp_path / "memory.png").exists()


def test_page_is_written_and_said_where(folders, tmp_path):
    page = tmp_path / "new" / "report.html"
    result = _run("report", *folders, "--html", str(page))
    assert f"page: {page}" in result.output
    assert "0.55x the peak of" in page.read_text()


def test_schema_is_printed_as_it_is_published_and_needs_no_folder():
    result = _run("report", "--schema")
    assert (result.exit_code, result.output) == (0, SCHEMA_FILE.read_text())


def test_reports_of_an_earlier_release_of_this_package_are_shown(folders):
    for file in Path(folders[1]).iterdir():
        data = json.loads(file.read_text())
        del data["scheme"], data["missing"], data["node"], data["layers"]["figures"]
        file.write_text(json.dumps(data))
    assert _row(_run("report", folders[1]).output, "TP0/2")[1] == "streaming"


def test_report_of_a_missing_folder_says_what_to_give(tmp_path):
    result = _run("report", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "SGLANG_STREAMFP8_REPORT" in result.output


def test_help_teaches_by_example():
    output = _run("--help").output
    assert "python -m sglang_overlay check" in output
    assert "SGLANG_STREAMFP8_REPORT=reports python -m sglang.launch_server" in output


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_of_each_command_has_an_example_and_its_exit_codes(command):
    output = _run(command, "--help").output
    if command == "run":
        assert "exit code is" in re.sub(r"\s+", " ", output)
    else:
        assert re.search(r"Exit codes:\n +0  \w", output)
    assert f"python -m sglang_overlay {command}" in output


def test_what_follows_the_module_is_the_modules_own(monkeypatch):
    started = []
    monkeypatch.setattr(launch, "run", lambda module, arguments: started.append((module, arguments)))
    assert _run("run", "json.tool", "--help", "-h", "--", "--no-such-option", "file").exit_code == 0
    assert started == [("json.tool", ("--help", "-h", "--", "--no-such-option", "file"))]


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.main", "json.no_such_module", "json.tool.main"])
def test_module_that_is_not_there_is_told(module):
    result = _run("run", module)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.output.startswith(f"Error: there is no module {module!r} for {sys.executable}. ")


def test_import_that_fails_in_the_program_is_its_own(monkeypatch, tmp_path):
    (tmp_path / "program_that_breaks").mkdir()
    (tmp_path / "program_that_breaks" / "__init__.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    failure = _run("run", "program_that_breaks.main").exception
    assert (type(failure), failure.name) == (ModuleNotFoundError, "no_such_package")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("sglang-streamfp8 re", {"report"}),
        ("sglang-streamfp8 report --h", {"--html", "--help"}),
        ("sglang-streamfp8 export --scheme b", {"block"}),
        ("sglang-streamfp8 patch --release 0.5.2", {"0.5.20", "0.5.21", "0.5.22", "0.5.23"}),
        ("sglang-streamfp8 plan --gpu H2", {"H200"}),
    ],
)
def test_shell_completes(words, offered):
    instruction = {
        "_SGLANG_STREAMFP8_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    result = CliRunner().invoke(main, prog_name="sglang-streamfp8", env=instruction)
    assert {line.partition(",")[2] for line in result.output.splitlines()} == offered


def test_completion_and_help_import_neither_torch_nor_sglang():
    done = _python("-c", "import sys, sglang_overlay.cli; print({'torch', 'sglang', 'rich'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_version():
    assert sglang_overlay.__version__ in _run("--version").output
    assert sglang_overlay.__version__ == metadata.version("sglang-streamfp8")


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environ_with(**environment)
    )


def test_command_runs_as_a_module_and_piped_output_has_no_colour(folders):
    done = _python("-m", "sglang_overlay", "report", *folders)
    assert done.returncode == 0, done.stderr
    assert "TP0/2" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_terminal_gets_colour_unless_told_otherwise(folders, variables, coloured):
    control, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"}
    environment.pop("NO_COLOR", None)
    environment.update(variables)
    command = [sys.executable, "-m", "sglang_overlay", "report", *folders]
    process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.DEVNULL, env=environment)
    os.close(terminal)
    output = b""
    while select.select([control], [], [], 60)[0]:
        try:
            chunk = os.read(control, 65_536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(control)
    assert process.wait(timeout=60) == 0
    # Bold is no colour.
    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]", output)) == coloured
    assert b"TP0/2" in output


@pytest.mark.parametrize("width", [80, 100])
def test_no_figure_is_cut_off_on_a_narrow_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    terminal.print_reports(console, Group("reports", [replace(STREAMING, seconds=754.0)], ["reports"]))
    for figure in ("12 min 34 s", "+1.38 GB", "1.25 GB", "1.10x", "3.10 MB", "1234", "210", "61"):
        assert figure in console.file.getvalue()
    assert "…" not in console.file.getvalue()
    assert "streaming" in console.file.getvalue()


_EACH_FORM = """
import sys
from sglang_overlay.cli import main

for arguments in (["check", "--json"], ["check"], ["check", "--verbose"]):
    try:
        main(arguments)
    except SystemExit as end:
        print(f"exit {end.code}")
"""
_AS_JSON = """
from sglang_overlay.cli import main

main(["check", "--json"])
"""


@pytest.fixture(scope="module")
def checks(forked_python):
    """``check`` under different settings, each in its own process: SGLang loads plugins once in a process."""
    runs = {
        "default": (_EACH_FORM, {}),
        "off": (_EACH_FORM, {"SGLANG_STREAMFP8": "0"}),
        "left out": (_AS_JSON, {"SGLANG_PLUGINS": "other,streamfp8_cpu_reference"}),
        "other platform": (_AS_JSON, {"SGLANG_USE_CPU_ENGINE": "1"}),
        "no accelerator": (
            _AS_JSON,
            # As in a pod of ci/container/kubernetes.yaml that has lost its GPU.
            {
                CPU_REFERENCE_VARIABLE: "0",
                MODE_VARIABLE: "require",
                "CUDA_VISIBLE_DEVICES": "",
                "HIP_VISIBLE_DEVICES": "",
            },
        ),
    }
    return {name: forked_python.run(program, (), environ_with(**changes)) for name, (program, changes) in runs.items()}


@pytest.fixture(scope="module")
def active(checks):
    """What ``check`` says where streaming is active: (JSON data, text, verbose text), after a look at exit codes."""
    as_json, text, verbose, rest = checks["default"].stdout.split("exit 0\n")
    assert rest == "", checks["default"].stdout
    return json.loads(as_json), text, verbose


def test_check_says_active_with_every_hook_in_place(active):
    found, _, _ = active
    assert (found["schema"], found["version"]) == ("sglang-streamfp8/check", 1)
    assert (found["active"], found["problems"]) == (True, [])
    assert found["release"] == metadata.version("sglang")
    assert found["release"] in found["supported"]
    assert {hook["state"] for hook in found["streaming"]} == {"active"}
    assert {hook["state"] for hook in found["telling"]} == {"active"}
    # Nor did other plugins' hooks come to harm.
    assert found["messages"] == []
    assert found["notes"][-len(NOTES) :] == list(NOTES)
    targets = [hook["target"] for hook in found["streaming"]]
    assert "sglang.srt.layers.quantization.fp8.Fp8MoEMethod.create_weights" in targets


def test_check_fits_a_screen_where_nothing_is_wrong(active):
    found, text, _ = active
    assert "\x1b" not in text
    assert re.match(r"StreamFP8 \S+: active, SGLang \S+", text)
    assert f"Hooks for streaming: {len(found['streaming'])} active" in text
    assert "why:" not in text
    assert len(text.splitlines()) < 24
    flowing = re.sub(r"\s+", " ", text)
    assert all(note in flowing for note in NOTES)


def test_check_describes_each_hook_with_its_reason_and_end_when_asked(active):
    found, _, verbose = active
    flowing = re.sub(r"\s+", " ", verbose)
    for hook in found["streaming"]:
        assert f"active {hook['target']} ({hook['kind']})" in flowing
        assert f"why: {hook['why']}" in flowing
        assert f"can go when: {hook['remove_when']}" in flowing


def test_check_names_the_variable_that_switched_streaming_off(checks):
    as_json, text, verbose, rest = checks["off"].stdout.split("exit 1\n")
    assert rest == "", checks["off"].stdout
    found = json.loads(as_json)
    assert (found["active"], found["mode"]) == (False, "0")
    assert len(found["problems"]) == 1
    assert "SGLANG_STREAMFP8=0" in found["problems"][0]
    assert {hook["state"] for hook in found["streaming"]} == {"ready"}
    # The problem is not to scroll away above hooks that are as they should be.
    assert f"problem  {found['problems'][0]}" in text
    assert len(text.splitlines()) < 24
    assert "why:" in verbose


def test_check_reports_an_invalid_setting_at_once():
    done = _python("-m", "sglang_overlay", "check", "--json", SGLANG_STREAMFP8="maybe")
    found = json.loads(done.stdout)
    assert (done.returncode, found["active"], found["mode"]) == (1, False, None)
    assert len(found["problems"]) == 1
    assert "maybe" in found["problems"][0]


def test_check_sees_that_the_allowlist_leaves_the_plugin_out(checks):
    done = checks["left out"]
    found = json.loads(done.stdout)
    assert (done.returncode, found["active"]) == (1, False)
    assert "SGLANG_PLUGINS=other,streamfp8_cpu_reference,streamfp8" in found["problems"][0]
    assert {hook["state"] for hook in found["streaming"]} == {"ready"}


def test_check_says_no_on_a_platform_that_is_not_covered(checks):
    done = checks["other platform"]
    found = json.loads(done.stdout)
    assert (done.returncode, found["active"]) == (1, False)
    assert "fp8 post-processing of this platform (cpu) is not covered yet" in found["problems"][0]


def test_check_says_no_without_an_accelerator_and_how_to_try_it_all_the_same(checks):
    done = checks["no accelerator"]
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problem.startswith("No accelerator (")
    assert f"{CPU_REFERENCE_VARIABLE}=1 has SGLang serve on the CPU" in problem


def test_check_without_sglang_says_what_to_install(tmp_path):
    """A Python that sees this package and what its command line needs, and nothing else."""
    for name in ("click", "rich", "pygments", "markdown_it", "mdurl"):
        (tmp_path / name).symlink_to(Path(util.find_spec(name).origin).parent)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = _python("-S", "-m", "sglang_overlay", "check", PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "not active, no SGLang" in done.stdout
    assert "run: pip install sglang" in re.sub(r"\s+", " ", done.stdout)
