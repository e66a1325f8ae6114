"""``ci/compare``."""

from __future__ import annotations

from click.testing import CliRunner
from workbench.loads.compare_cli import main


def test_streaming_is_compared_with_stock(checkpoint):
    told = CliRunner().invoke(main, [str(checkpoint("qwen3_moe"))])
    assert told.exit_code == 0, told.output
    assert told.output.splitlines() == ["bit-identical"]


def test_what_differs_is_named(checkpoint):
    told = CliRunner().invoke(main, ["--scheme", "channel", str(checkpoint("qwen3"))])
    assert told.exit_code == 1, told.output
    assert "rank 0: model.layers.0.self_attn.qkv_proj.weight_scale: shape" in told.output
    assert told.output.splitlines()[-1].endswith(" differences")


def test_only_so_many_differences_are_named_as_wanted(checkpoint):
    told = CliRunner().invoke(main, ["--scheme", "channel", "--most", "1", str(checkpoint("qwen3"))])
    first, rest, number = told.output.splitlines()
    assert first.startswith("rank 0: ")
    assert rest == f"and {int(number.split()[0]) - 1} more"
