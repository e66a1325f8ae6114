"""What SGLang's linters and its test runner say of a patch series is found, and only of what the series brings."""

from __future__ import annotations

from pathlib import Path

import pytest
from workbench.releases import lint_patches, patched, series

from sglang_overlay.hooks import releases

RELEASE = releases.installed() or ""
TEST = "test/registered/quant/test_it.py"
RUN = 'if __name__ == "__main__":\n    unittest.main()\n'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Linters that complain of each line with the word "bad", with its number."""
    for program in ("black", "ruff", "isort", "codespell"):
        tool = tmp_path / program
        tool.write_text('#!/bin/sh\nfor file; do [ ! -f "$file" ] || grep -Hn bad "$file"; done | (! grep .)\n')
        tool.chmod(0o755)
    return tmp_path


def test_each_linter_is_heard(tools: Path) -> None:
    found = lint_patches.complaints(RELEASE, {"a.py": "good\nbad\n"}, {}, tools)
    assert found == [f"{program}: a.py:2:bad" for program in ("ruff", "isort", "ruff", "codespell")]


def test_what_a_file_had_before_is_not_reported(tools: Path) -> None:
    before = {"a.py": "bad\n"}
    assert lint_patches.complaints(RELEASE, {"a.py": "more\nbad\n"}, before, tools) == []
    assert lint_patches.complaints(RELEASE, {"a.py": "bad\nbad too\n"}, before, tools) != []


@pytest.mark.parametrize("text", ["a \n", "a", "a\n\n", "b = 'ä'\n"])
def test_new_file_with_stray_characters_is_reported(text: str, tools: Path) -> None:
    assert len(lint_patches.complaints(RELEASE, {"a.py": text}, {}, tools)) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RUN, "No CI registry"),
        ('register_cpu_ci(est_time=1, suite="base-a-test-cpu")\n', "missing `if __name__"),
        (f'register_cpu_ci(est_time=1, suite="other")\n{RUN}', "no suite of every supported release: other"),
    ],
)
def test_test_that_the_runner_would_stop_at_is_reported(text: str, said: str) -> None:
    (problem,) = lint_patches.unregistered({TEST: text}, patched.installed())
    assert TEST in problem
    assert said in problem


@pytest.mark.every_release
@pytest.mark.skipif(
    releases.supported()[0] == RELEASE, reason="0.5.11's runner does not know stages, which later ones want"
)
def test_tests_of_the_series_are_found_by_the_runner() -> None:
    files: dict[str, str] = {}
    for _, changed in series.commits(patched.installed()):
        files.update(changed)
    assert lint_patches.unregistered(files, patched.installed()) == []
    assert [path for path in files if path.startswith("test/registered/")]
