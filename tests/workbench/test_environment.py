"""Environments are built for real here, less the packages, which are what takes minutes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from workbench.releases import environment
from workbench.releases.environment import EnvironmentSetupError, Plan

from sglang_overlay.hooks import releases

LOCK = """\
# made by a tool
alpha==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:ab
    # via beta
Beta.Kernels[extra]==2.0 ; python_version > "3" \\
    --hash=sha256:bb
gamma==3.0 \\
    --hash=sha256:cc
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A small clone with a lock of its own, and a cache of its own."""
    return Plan(release="1.2.3", packages="cpu", clone=make_clone(tmp_path / "clone"), cache=tmp_path / "cache")


def make_clone(root: Path, lock: str = "# empty\n", greeting: str = "hello") -> Path:
    locks = root / "ci" / "locks"
    locks.mkdir(parents=True)
    (locks / "1.2.3.txt").write_text(lock)
    (locks / "gpu_only.txt").write_text("# kernels\nbeta-kernels  # of beta\n")
    shutil.copy(environment.CLONE / "ci" / "locks" / "uv.txt", locks)
    (root / "pyproject.toml").write_text("")
    (root / "setup.py").write_text("name = 1\n")
    (root / "greeting.py").write_text(f"print({greeting!r})\n")
    return root


def fake_install(plan: Plan, uv: Path, target: Path, arguments: list[str]) -> None:
    """Stands in for `uv pip install`, which needs a package index."""
    if "--editable" in arguments:
        (environment.site_packages(target) / "editable.pth").write_text(f"{plan.clone}\n")
    else:
        (environment.site_packages(target) / "shared_package.py").write_text("print('shared')\n")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Takes the package index out of the way, and counts what would have been installed, in no room at all."""
    calls: list[list[str]] = []
    monkeypatch.setitem(environment.BYTES_NEEDED, "cpu", 0)

    def install(plan: Plan, uv: Path, target: Path, arguments: list[str]) -> None:
        calls.append(arguments)
        fake_install(plan, uv, target, arguments)

    monkeypatch.setattr(environment, "install", install)
    monkeypatch.setattr(environment, "ensure_uv", lambda plan: Path("uv"))
    return calls


def said_by(python: Path, module: str) -> str:
    return subprocess.run([python, "-P", "-m", module], check=True, capture_output=True, text=True).stdout.strip()


def test_entries_are_taken_out_with_their_hashes() -> None:
    kept = environment.without(LOCK, frozenset({"beta-kernels"}))
    assert kept == LOCK[: LOCK.index("Beta")] + LOCK[LOCK.index("gamma") :]


def test_names_are_compared_the_way_package_indexes_do() -> None:
    assert environment.without("A_b.C==1 \\\n    --hash=sha256:aa\n", frozenset({"a-b-c"})) == ""


def test_name_that_only_begins_alike_is_kept() -> None:
    assert "gamma==3.0" in environment.without(LOCK, frozenset({"gam", "gamma-extra"}))


def test_gpu_selection_is_the_whole_lock(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone", LOCK)
    whole = Plan("1.2.3", "gpu", clone, tmp_path)
    assert whole.requirements == LOCK
    assert "Beta" not in dataclasses.replace(whole, packages="cpu").requirements


@pytest.fixture
def put_on(plan: Plan) -> Plan:
    """A release with another alpha and without gamma, put on the one of ``plan``."""
    plan.lock.write_text(LOCK)
    other = dataclasses.replace(plan, release="1.2.4")
    other.lock.write_text("# on 1.2.3.txt without gamma\nalpha==1.1 \\\n    --hash=sha256:ad\n")
    return other


def test_lock_that_is_put_on_another_is_put_together(put_on: Plan) -> None:
    assert [entry.split()[0] for entry in environment.entries(put_on.locked).values()] == [
        "Beta.Kernels[extra]==2.0",
        "alpha==1.1",
    ]


def test_release_put_on_another_installs_what_differs_and_sees_the_rest(
    put_on: Plan, plan: Plan, offline: list[list[str]]
) -> None:
    python = environment.ensure(put_on)
    listings = [Path(arguments[-1]).read_text() for arguments in offline if "-r" in arguments]
    assert ["alpha==1.0" in listings[0], listings[1]] == [True, put_on.lock.read_text()]
    for name, parts in {"both": (plan, put_on), "theirs": (plan,)}.items():
        for part in parts:
            (environment.site_packages(part.base) / f"{name}.py").write_text(f"print({part.release!r})")
    assert (said_by(python, "both"), said_by(python, "theirs")) == ("1.2.4", "1.2.3")
    assert (environment.ensure(plan), len(offline)) == (environment.interpreter(plan.layer), 4)


def test_with_gpu_packages_nothing_is_shared(put_on: Plan) -> None:
    whole = dataclasses.replace(put_on, packages="gpu")
    assert (whole.parent, whole.own_requirements) == (None, put_on.locked)


def test_environment_is_used_again_without_installing(plan: Plan, offline: list[list[str]]) -> None:
    first = environment.ensure(plan)
    assert len(offline) == 2
    assert environment.ensure(plan) == first
    assert len(offline) == 2


def test_environment_sees_the_shared_packages_and_the_clone(plan: Plan, offline: list[list[str]]) -> None:
    python = environment.ensure(plan)
    assert said_by(python, "shared_package") == "shared"
    assert said_by(python, "greeting") == "hello"


def test_two_clones_share_packages_and_never_code(plan: Plan, offline: list[list[str]], tmp_path: Path) -> None:
    other = dataclasses.replace(plan, clone=make_clone(tmp_path / "other", greeting="good day"))
    first, second = environment.ensure(plan), environment.ensure(other)
    assert (said_by(first, "greeting"), said_by(second, "greeting")) == ("hello", "good day")
    assert plan.base == other.base
    assert len(offline) == 3


def test_changed_lock_gets_an_environment_of_its_own(plan: Plan, offline: list[list[str]]) -> None:
    before = environment.ensure(plan)
    plan.lock.write_text(LOCK)
    assert environment.ensure(plan) != before
    assert len(offline) == 4


def test_half_built_environment_is_built_anew(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ensure_uv", lambda plan: Path("uv"))

    def break_off(plan: Plan, uv: Path, target: Path, arguments: list[str]) -> None:
        (environment.site_packages(target) / "debris.py").write_text("")
        raise EnvironmentSetupError("the network went away")

    monkeypatch.setattr(environment, "install", break_off)
    with pytest.raises(EnvironmentSetupError):
        environment.ensure(plan)
    monkeypatch.setattr(environment, "install", fake_install)
    python = environment.ensure(plan)
    assert said_by(python, "shared_package") == "shared"
    assert not (environment.site_packages(plan.base) / "debris.py").exists()


def test_environment_whose_interpreter_went_away_is_built_anew(plan: Plan, offline: list[list[str]]) -> None:
    environment.ensure(plan)
    for part in (plan.base, plan.layer):
        environment.interpreter(part).unlink()
        environment.interpreter(part).symlink_to(plan.cache / "uninstalled")
    assert said_by(environment.ensure(plan), "greeting") == "hello"
    assert environment.interpreter(plan.base).exists()


def test_changed_packaging_installs_the_clone_again_and_nothing_else(plan: Plan, offline: list[list[str]]) -> None:
    environment.ensure(plan)
    (plan.clone / "setup.py").write_text("name = 2\n")
    environment.ensure(plan)
    assert ["--editable" in arguments for arguments in offline] == [False, True, True]


def test_second_process_waits_for_the_first(plan: Plan, offline: list[list[str]]) -> None:
    threads = [threading.Thread(target=environment.ensure, args=(plan,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(offline) == 2


def test_failed_step_names_the_command_and_what_to_do(plan: Plan) -> None:
    plan.cache.mkdir()
    with pytest.raises(EnvironmentSetupError, match=r"failed: .*exit\(3\)(.|\n)*run the same command again"):
        environment.step(plan, [sys.executable, "-c", "exit(3)"])


def test_output_of_a_step_leaves_standard_output_to_the_result(plan: Plan, capfd: pytest.CaptureFixture[str]) -> None:
    plan.cache.mkdir()
    environment.step(plan, [sys.executable, "-c", "print('downloading')"])
    printed = capfd.readouterr()
    assert (printed.out, "downloading" in printed.err) == ("", True)


def test_installs_are_not_redirected_by_the_callers_variables(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PIP_TARGET", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_CERT", "certificates.pem")
    variables = environment.step_environment(plan)
    assert not {"PYTHONPATH", "PIP_TARGET", "VIRTUAL_ENV"} & variables.keys()
    assert variables["PIP_CERT"] == "certificates.pem"
    assert variables["UV_PYTHON_DOWNLOADS"] == "never"


def test_full_disk_is_noticed_before_anything_is_downloaded(
    plan: Plan, offline: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environment.BYTES_NEEDED, "cpu", 2**60)
    with pytest.raises(EnvironmentSetupError, match="STREAMFP8_CACHE"):
        environment.ensure(plan)
    assert offline == []


def test_unknown_release_lists_the_known_ones(plan: Plan) -> None:
    with pytest.raises(EnvironmentSetupError, match=r"SGLang 9\.9(.|\n)*1\.2\.3"):
        environment.ensure(dataclasses.replace(plan, release="9.9"))


def test_other_machine_is_told_how_to_go_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv64")
    with pytest.raises(EnvironmentSetupError, match=r"riscv64(.|\n)*pip install"):
        environment.ensure(plan)


def test_cache_folder_follows_the_variable_then_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMFP8_CACHE", str(tmp_path / "mine"))
    assert environment.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("STREAMFP8_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_root() == tmp_path / "sglang-streamfp8"


def test_command_prints_the_interpreter_and_nothing_else(
    plan: Plan, offline: list[list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "planned", lambda release, packages: plan)
    assert environment.main([]) == 0
    assert capfd.readouterr().out == f"{environment.interpreter(plan.layer)}\n"


def test_command_reports_failure_on_standard_error(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "planned", lambda release, packages: dataclasses.replace(plan, release=release))
    assert environment.main(["--release", "9.9"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: There is no lock file for SGLang 9.9")


def test_supported_releases_are_those_with_a_lock() -> None:
    assert environment.supported() == environment.locked()


def test_sample_is_the_oldest_one_of_the_torch_in_the_middle_and_the_newest(tmp_path: Path) -> None:
    def sample(**torches: str) -> list[str]:
        file = tmp_path / environment.RELEASES
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"release": release, "torch": torch} for release, torch in torches.items()]
        file.write_text(json.dumps({"supported": entries}))
        return environment.sample(tmp_path)

    assert sample(a="1", b="1", c="1", d="1", e="2", f="2", g="3") == ["a", "e", "g"]
    assert sample(a="1", b="1", c="2") == ["a", "c"]
    assert sample(a="1", b="1") == ["a", "b"]
    assert sample(a="1") == ["a"]


def test_newest_supported_release_is_what_everything_uses() -> None:
    assert environment.planned(packages="cpu").release == environment.supported()[-1]


@pytest.mark.parametrize(("which", "printed"), [("all", environment.supported), ("sample", environment.sample)])
def test_command_lists_releases_one_a_line(
    which: str, printed: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment.main(["--list", which]) == 0
    assert capsys.readouterr().out.split() == printed()


@pytest.mark.parametrize("release", environment.locked())
def test_lock_pins_what_the_release_is_said_to_pin(release: str) -> None:
    (entry,) = (entry for entry in releases.facts() if entry.release == release)
    plan = environment.planned(release, "cpu")
    assert f"\ntorch=={entry.torch} " in plan.locked
    assert f"\ntransformers=={entry.transformers} " in plan.locked
    assert f"\nsglang=={release} " in plan.locked
    own = environment.entries(plan.lock.read_text())
    assert plan.parent is None or not {"torch", "transformers"} & own.keys()


def test_one_environment_serves_releases_of_the_same_torch_and_transformers() -> None:
    whole = [entry for entry in releases.facts() if environment.planned(entry.release, "cpu").parent is None]
    assert len({(entry.torch, entry.transformers) for entry in whole}) == len(whole)


LOCKS = sorted(path.stem for path in (environment.CLONE / "ci" / "locks").glob("*.in") if path.stem != "project")
"""Releases, uv, and the tools of ci/build, ci/docs and ci/lint_workflows."""


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_a_hash_and_no_address(name: str) -> None:
    text = (environment.CLONE / "ci" / "locks" / f"{name}.txt").read_text()
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert entries
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert "://" not in text
    assert "--index" not in text


def test_every_gpu_only_name_is_in_some_lock_and_torch_stays() -> None:
    locks = environment.CLONE / "ci" / "locks"
    locked = "".join((locks / f"{release}.txt").read_text() for release in environment.locked())
    names = {environment.normalized(name) for name in re.findall(r"^([\w.-]+)==", locked, flags=re.MULTILINE)}
    gpu_only = environment.names_in(locks / "gpu_only.txt")
    assert gpu_only <= names
    assert not {"torch", "nvidia-nvshmem-cu13", "sglang"} & gpu_only


def test_locks_are_made_from_what_setup_declares() -> None:
    declared = {
        str(requirement.name) + str(requirement.specifier)
        for requirement in map(Requirement, importlib.metadata.requires("sglang-streamfp8") or [])
        if requirement.name != "sglang"
    }
    lines = (environment.CLONE / "ci" / "locks" / "project.in").read_text().splitlines()
    asked_for = {line for line in lines if line and not line.startswith("#")}
    assert declared == asked_for - {"setuptools>=77", "wheel"}
