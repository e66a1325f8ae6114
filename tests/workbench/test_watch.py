# SPDX-License-Identifier: Apache-2.0
"""What has moved in a source tree of SGLang is noticed and told; what has not is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sglang
from click.testing import CliRunner
from workbench.releases import watch

SRT = Path(sglang.__file__).parent / "srt"
FP8 = Path("layers", "quantization", "fp8.py")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout of the installed release, of which only what is hooked is looked at."""
    monkeypatch.setattr(watch, "fetch", lambda release: SRT.parents[1])
    copy = tmp_path / "checkout" / "python" / "sglang"
    shutil.copytree(
        SRT.parent, copy, ignore=lambda folder, names: [name for name in names if "." in name and name[-3:] != ".py"]
    )
    return tmp_path / "checkout"


def look(tree, report):
    return CliRunner().invoke(watch.main, ["--tree", str(tree), "--report", str(report)], catch_exceptions=False)


def test_same_tree_has_nothing_to_report(tree, tmp_path):
    outcome = look(tree, tmp_path / "report.md")
    assert outcome.exit_code == 0, outcome.output
    assert "No hooked function differs" in outcome.output
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("taken", ["module", "layer, extra"])
def test_function_that_takes_something_else_or_more_is_reported_by_name(taken, tree, tmp_path):
    file = tree / "python" / "sglang" / "srt" / FP8
    text = file.read_text()
    assert "def process_weights_after_loading(self, layer" in text
    file.write_text(text.replace("after_loading(self, layer", f"after_loading(self, {taken}"))
    outcome = look(tree, tmp_path / "report.md")
    assert outcome.exit_code == 1
    report = (tmp_path / "report.md").read_text()
    assert "- `sglang.srt.layers.quantization.fp8.Fp8LinearMethod.process_weights_after_loading`: signature" in report


def test_folder_without_sglang_is_an_error(tmp_path):
    outcome = CliRunner().invoke(watch.main, ["--tree", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "there is no SGLang in" in outcome.output
