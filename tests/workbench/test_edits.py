"""Hunks without line numbers: where they fit, which of several is made, and what is said where none fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from workbench.releases import environment, misfits, new_release, series
from workbench.releases.edits import EditError, edited, parsed

SOURCE = """\
import a
import c


class Loader:
    retries = 3

    @staticmethod
    def load(path):
        check(path)
        return path


def load(path):
    check(path)
    return path
"""


def made(diff: str, source: str = SOURCE) -> str:
    """The source with edits made."""
    edits = parsed(f"--- loader.py\n{diff}", "1.diff")
    return edited({"loader.py": source}.get, edits, 1).get("loader.py", source)


def test_hunk_changes_the_function_it_names_and_no_other() -> None:
    assert made("@@ load @@\n     check(path)\n-    return path\n+    return read(path)\n") == SOURCE.replace(
        "\n    return path", "\n    return read(path)"
    )
    assert made("@@ Loader.load @@\n-        check(path)\n") == SOURCE.replace("        check(path)\n", "")


def test_decorators_belong_to_a_function_and_fields_to_a_class() -> None:
    assert "    @timed\n    @staticmethod\n" in made("@@ Loader.load @@\n+    @timed\n     @staticmethod\n")
    assert "    retries = 4\n" in made("@@ Loader @@\n-    retries = 3\n+    retries = 4\n")
    assert "\nLIMIT = 1\n\n\nclass Loader" in made("@@ Loader @@\n+LIMIT = 1\n+\n+\n class Loader:\n")


def test_hunk_that_names_nothing_is_outside_of_functions_and_classes() -> None:
    assert made("@@ @@\n import a\n+import b\n import c\n").startswith("import a\nimport b\nimport c\n")
    with pytest.raises(EditError, match=r"loader\.py, outside of functions and classes: the lines to change are not"):
        made("@@ @@\n-    check(path)\n")


def test_hunks_of_a_function_may_share_context_and_all_see_it_as_it_was() -> None:
    one = "@@ load @@\n def load(path):\n+    log(path)\n     check(path)\n"
    other = "@@ load @@\n     check(path)\n-    return path\n"
    assert made(one + other).endswith("def load(path):\n    log(path)\n    check(path)\n")
    with pytest.raises(ValueError, match="two hunks change the same line of loader"):
        made("@@ load @@\n-    check(path)\n@@ load @@\n-    check(path)\n+    pass\n")


def test_first_alternative_that_fits_is_made() -> None:
    diff = "@@ Loader.read @@\n-        gone()\n@@ or load @@\n-    check(path)\n@@ or load @@\n-    return path\n"
    assert made(diff) == SOURCE.replace("\n    check(path)", "")


def test_alternative_may_be_in_another_file() -> None:
    edits = parsed("--- moved.py\n@@ load @@\n-    check(path)\n--- loader.py\n@@ or load @@\n-    check(path)\n", "")
    assert list(edited({"loader.py": SOURCE}.get, edits, 1)) == ["loader.py"]


def test_optional_hunk_is_made_where_it_fits() -> None:
    assert made("@@ optional load @@\n-    gone()\n") == SOURCE
    assert made("@@ optional @@\n-import a\n") == SOURCE.removeprefix("import a\n")


def test_comments_and_empty_lines_after_a_hunk_are_no_part_of_it() -> None:
    assert made("# Why.\n\n@@ @@\n-import a\n# Why not.\n\n@@ @@\n import c\n\n\n+LIMIT = 1\n").startswith(
        "import c\n\n\nLIMIT = 1\n"
    )


@pytest.mark.parametrize(
    ("diff", "why"),
    [
        ("@@ gone @@\n-    check(path)\n", r"loader\.py, gone: there is no such function"),
        ("@@ load @@\n-    gone()\n", r"loader\.py, load: the lines to change are not there"),
        (
            "@@ Loader.load @@\n-        return path\n         check(path)\n",
            r"Loader\.load: the lines .* are not there",
        ),
        ("@@ load @@\n-    return path\n", r"loader\.py, load: the lines to change occur 2 times"),
        ("--- gone.py\n@@ load @@\n-    check(path)\n", r"gone\.py, load: there is no such file"),
    ],
)
def test_misfit_names_patch_file_function_and_why(diff: str, why: str) -> None:
    with pytest.raises(EditError, match=f"patch 1 does not fit: .*{why}"):
        made(diff, f"{SOURCE}    return path\n")


@pytest.mark.parametrize("diff", ["load\n", "@@ load @@\nreturn path\n", "@@ load @@\n+    pass\n", "@@ load @@\n a\n"])
def test_malformed_hunk_is_refused(diff: str) -> None:
    with pytest.raises(ValueError, match=r"^1\.diff: "):
        parsed(f"--- loader.py\n{diff}", "1.diff")


class TestMisfitsExplained:
    @pytest.fixture(autouse=True)
    def releases(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Releases 1.0 to 3.0, each with another loader; patch 1 fits the first two, patch 2 needs patch 1."""
        loaders = {"1.0": SOURCE, "2.0": SOURCE.replace("\n    check(path)", "\n    check(path, 2)")}
        loaders["3.0"] = loaders["2.0"].replace(
            "def load(path):\n    check(path, 2)", "def load(path):\n    verify(path)"
        )
        for release, text in loaders.items():
            (tmp_path / release / "sglang").mkdir(parents=True)
            (tmp_path / release / "sglang" / "loader.py").write_text(text)
        first = (
            "@@ load @@\n-    check(path)\n+    checked(path)\n@@ or load @@\n-    check(path, 2)\n+    checked(path)\n"
        )
        for number, diff in {1: first, 2: "@@ load @@\n-    checked(path)\n"}.items():
            (tmp_path / f"{number}.diff").write_text(f"--- python/sglang/loader.py\n{diff}")
        monkeypatch.setattr(series, "EDITS", tmp_path)
        monkeypatch.setattr(series, "PATCHES", (series.Patch(1), series.Patch(2)))
        monkeypatch.setattr(new_release, "fetch", tmp_path.joinpath)
        monkeypatch.setattr(environment, "supported", lambda: ["1.0", "2.0"])

    def explained(self, tmp_path: Path, release: str, patch: int = 3) -> str:
        with pytest.raises(EditError) as raised:
            series.before(tmp_path / release, patch)
        return misfits.explained(raised.value, tmp_path / release, release)

    def test_function_is_compared_with_the_release_before(self, tmp_path: Path) -> None:
        text = self.explained(tmp_path, "3.0")
        assert "SGLang 3.0:\n\npatch 1 does not fit: python/sglang/loader.py, load: the lines to change are not" in text
        assert "--- 2.0\n+++ 3.0\n" in text
        assert "-    check(path, 2)\n+    verify(path)\n" in text
        assert "class Loader" not in text

    def test_oldest_release_is_compared_with_a_later_one(self, tmp_path: Path) -> None:
        (tmp_path / "1.0" / "sglang" / "loader.py").write_text("def load(path):\n    pass\n")
        assert "--- 2.0\n+++ 1.0\n" in self.explained(tmp_path, "1.0")

    def test_edit_that_fits_nowhere_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "2.diff").write_text("--- python/sglang/loader.py\n@@ load @@\n-    gone()\n")
        assert self.explained(tmp_path, "2.0").endswith("It fits no supported release.")
