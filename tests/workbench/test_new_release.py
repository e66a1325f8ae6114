"""Comparing two releases, and entering one; the fetching and running is `ci/new_release`'s own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workbench.releases import bodies, environment, make_patches, new_release
from workbench.releases.environment import CLONE, RELEASES

from sglang_overlay.hooks.hook import Hook, HookKind, Place

LOAD = Hook("up.a.load", "os:getcwd", HookKind.AROUND, ("path",), "a reason", (), "it is fixed")
METADATA = """\
Metadata-Version: 2.4
Name: sglang
Requires-Python: >=3.11
Requires-Dist: torch==9.1
Requires-Dist: torch==9.0; extra == "old"
Requires-Dist: transformers==8.2
"""


def tree(folder: Path, **modules: str) -> Path:
    (folder / "up").mkdir(parents=True)
    for name, text in modules.items():
        (folder / "up" / f"{name}.py").write_text(text)
    return folder


def changes(tmp_path: Path, before: str, after: str, point: Hook = LOAD, module: str = "a") -> list[Any]:
    return new_release.compare(tree(tmp_path / "1", a=before), tree(tmp_path / "2", **{module: after}), [point])


def test_function_that_is_the_same_is_not_listed(tmp_path: Path) -> None:
    assert changes(tmp_path, "def load(path): return 1", "def load(path):\n    return 1  # as ever") == []


def test_changed_body_is_a_diff(tmp_path: Path) -> None:
    (change,) = changes(tmp_path, "def load(path): return 1", "def load(path): return 2")
    assert (change.problem, change.notes) == ("", ())
    assert "-    return 1\n+    return 2" in change.diff


def test_changed_signature_is_noted_and_a_problem_where_it_does_not_fit(tmp_path: Path) -> None:
    (fits,) = changes(tmp_path / "fits", "def load(path): pass", "def load(path, device): pass")
    (broken,) = changes(tmp_path / "broken", "def load(path): pass", "def load(folder): pass")
    assert (fits.problem, fits.notes) == ("", ("it took path; it takes path, device",))
    assert broken.problem == "signature expected path; found folder"


def test_function_that_is_gone_is_a_problem(tmp_path: Path) -> None:
    (change,) = changes(tmp_path, "def load(path): pass", "")
    assert (change.target, change.problem) == ("up.a.load", "missing")


def test_function_that_streaming_can_do_without_is_said_to_be_gone(tmp_path: Path) -> None:
    point = Hook(**{**vars(LOAD), "without": "Loading."})
    (change,) = changes(tmp_path, "def load(path): pass", "", point)
    assert (change.problem, change.notes) == ("", ("it is gone, and with it: Loading.",))


def test_function_that_has_moved_is_noted(tmp_path: Path) -> None:
    point = Hook(**{**vars(LOAD), "target": "up.b.load", "elsewhere": (Place("up.a.load"),)})
    (change,) = changes(tmp_path, "def load(path): pass", "def load(path): pass", point, module="b")
    assert change.notes == ("it was up.a.load",)


def test_entry_is_what_the_package_says(tmp_path: Path) -> None:
    info = tmp_path / "sglang-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    entry = new_release.entry_of(tmp_path, "9.9", "2030-01-01")
    assert (entry["python"], entry["torch"], entry["transformers"]) == (">=3.11", "9.1", "8.2")
    assert "sglang.srt.model_loader.loader.PreshardedModelLoader.load_model" in entry["absent"]


def test_entry_takes_its_place_in_order_and_an_older_one_of_the_same_release_goes() -> None:
    text = json.dumps({"supported": [{"release": name, "absent": []} for name in ("0.5.9", "0.5.13.post1")]})
    for torch in ("1", "2"):
        text = new_release.with_entry(text, {"release": "0.5.10", "torch": torch, "absent": ["a.b"]})
    entries = json.loads(text)["supported"]
    assert [entry["release"] for entry in entries] == ["0.5.9", "0.5.10", "0.5.13.post1"]
    assert (entries[1]["torch"], entries[1]["absent"]) == ("2", ["a.b"])


def test_file_is_written_as_it_is_kept() -> None:
    text = (CLONE / RELEASES).read_text()
    assert new_release.with_entry(text, json.loads(text)["supported"][0]) == text


def test_table_of_releases_is_what_is_known_of_them() -> None:
    page = new_release.PAGE.read_text()
    assert new_release.with_facts(page, json.loads((CLONE / RELEASES).read_text())["supported"]) == page


def test_lock_is_put_on_that_of_a_release_with_the_same_torch_and_transformers() -> None:
    known = json.loads((CLONE / RELEASES).read_text())["supported"]
    same = new_release.lock_input({**known[-1], "release": "9.9"}, known)
    assert same.startswith(f"# on {known[-1]['release']}.txt\n")
    other = new_release.lock_input({**known[-1], "release": "9.9", "torch": "9.9"}, known)
    assert "# on" not in other
    assert other.endswith("\nsglang==9.9\n\n-r project.in\n")


def test_release_gets_its_series_before_anything_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, ...]] = []
    monkeypatch.setattr(new_release, "enter", lambda *_: None)
    monkeypatch.setattr(new_release, "check", lambda _: [])
    monkeypatch.setattr(new_release, "_run", lambda *command, check: done.append(command) or True)
    assert new_release.take_on("9.9", Path()) == []
    first, *others = (script for script, *_ in done)
    assert first == "ci/make_patches"
    assert "ci/bodies" in others


def test_functions_of_a_release_without_a_series_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = make_patches.stored
    monkeypatch.setattr(environment, "supported", lambda: ["0.5.22", "0.5.23"])
    monkeypatch.setattr(make_patches, "stored", lambda release: {} if release == "0.5.23" else stored(release))
    found = json.loads(bodies.made())["functions"]
    names = {name for fingerprints in found.values() for known in fingerprints.values() for name in known}
    assert names == {"0.5.22", "0.5.22 with the series", "0.5.23"}


def test_previous_release_is_the_newest_before() -> None:
    known = ["0.5.13.post1", "0.5.15.post1", "0.5.17"]
    assert new_release.previous("0.5.16", known) == "0.5.15.post1"
    assert new_release.previous("0.6.0", known) == "0.5.17"
    with pytest.raises(SystemExit, match=r"no supported release is older than 0\.5\.1:"):
        new_release.previous("0.5.1", known)


def test_report_names_what_cannot_be_hooked_first_thing() -> None:
    change = new_release.Change("up.a.load", "missing", (), "")
    assert "## up.a.load\nCANNOT BE HOOKED: missing" in new_release.report([change], "1", "2")
    assert new_release.report([], "1", "2") == "No hooked function differs between 1 and 2."
