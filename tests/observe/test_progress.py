import ast
import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_overlay.observe import progress
from sglang_overlay.observe.progress import quantization_progress


def test_line_is_shown_that_reaches_the_end(capsys):
    line = quantization_progress(2_000_000)
    line.advance(1_500_000)
    line.advance(500_000)
    line.close()
    last = capsys.readouterr().err.strip().splitlines()[-1].split("\r")[-1]
    assert re.fullmatch(
        r"Quantizing weights to FP8: 100% Completed \| 2\.00M/2\.00M \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", last
    ), last


def test_nothing_to_quantize_shows_nothing(capsys):
    quantization_progress(0).close()
    assert capsys.readouterr().err == ""


def test_loader_threads_lose_no_bytes(capsys):
    line = quantization_progress(200_000)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2_000):
            pool.submit(line.advance, 100)
    line.close()
    assert "100% Completed | 200k/200k" in capsys.readouterr().err


def test_look_is_that_of_the_installed_sglang():
    """Read, not imported: importing SGLang takes seconds and needs torch."""
    package = importlib.util.find_spec("sglang")
    source = Path(package.origin).with_name("srt") / "utils" / "common.py"
    values = {
        statement.targets[0].id: statement.value
        for statement in ast.parse(source.read_text()).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    assert ast.literal_eval(values["BAR_FORMAT"]) == progress._LOOK
