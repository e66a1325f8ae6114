# SPDX-License-Identifier: Apache-2.0
"""Results of ``ci/quality`` as ``docs/quality.md``, with its picture and its data."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglang_overlay.observe.chart import INK
from sglang_overlay.observe.formats import bytes_text
from workbench.bench.chart_style import dress, empty_figure
from workbench.quality.quality import BF16, STOCK, Quality, difference, is_pointless, median_ratio

Results = Mapping[str, Sequence[Quality]]
"""All contenders' figures, by family."""

_PARTS = {"attention": "self_attn", "feed-forward": "mlp", "experts": ".experts."}
_COLOURS = ("#777777", "#D55E00", "#E69F00", "#009E73", "#0072B2", "#56B4E9", "#CC79A7")
_MARKERS = ("s", "o", "^", "v", "D", "X", "P")


def data_of(results: Results, facts: Mapping[str, Any], windows: int, length: int) -> dict[str, Any]:
    """All results as JSON data, without names of machines or paths."""
    packages = ("sglang", "sglang-streamfp8", "torch", "transformers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "windows": windows,
        "window_tokens": length,
        "models": {
            family: {**facts[family], "contenders": [asdict(quality) for quality in found]}
            for family, found in results.items()
        },
    }


def write_page(results: Results, data: Mapping[str, Any], docs: Path) -> None:
    """Write ``quality.md``, ``quality.json`` and ``images/quality.png`` under ``docs``."""
    (docs / "images").mkdir(parents=True, exist_ok=True)
    (docs / "quality.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (docs / "quality.md").write_text("\n".join(_page(results, data)) + "\n", encoding="utf-8")
    draw(results, docs / "images" / "quality.png")


def _page(results: Results, data: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {found}" for name, found in data["versions"].items())
    yield "# What each scheme costs in quality"
    yield ""
    yield "Written by `ci/quality`; do not edit. Data: `quality.json`."
    yield ""
    yield _METHOD.format(windows=data["windows"], length=data["window_tokens"], versions=versions)
    for family, found in results.items():
        facts = data["models"][family]
        yield f"\n## {family}\n"
        yield (
            f"{facts['parameters'] / 1e6:.1f} million parameters, {facts['recipe']['steps']} steps, training loss "
            f"{facts['loss']:.2f} nats a token, trained in {facts['seconds'] / 60:.0f} minutes.\n"
        )
        yield from _summary(found)
        yield "\nSignal to noise in dB, weight / output:\n"
        yield from _layers(found)
    yield "\n![Output error by layer, and loss](images/quality.png)"


_METHOD = """\
Two small models are trained on the sources and documentation of Python's standard library (byte-level BPE, 1,024
tokens), then given outlier channels: one channel in 64 of each norm and of each feed-forward network is made 8 to 64
times larger or smaller and its counterpart adjusted, which changes nothing of what the model computes. Real SGLang then
loads each with every scheme. The logprobs that its server returns give the perplexity over {windows} windows of
{length} tokens of files that were held out. `+loss` is the mean difference from bf16 on the same windows, with its
standard error. Errors are those of the weights SGLang serves, against the bf16 weights in float64; outputs are products
with what the bf16 model gives the layer on the same text (for experts: every token to every expert).

The CPU reference does not quantize activations, so the perplexity, `+loss` and errors are of weights alone. `+
activations` is how much the loss rises further when activations are rounded as SGLang 0.5.23 rounds them on NVIDIA GPUs
before each product: by token for linear layers; for experts all tokens of a call together where an expert has one
scale, else by token, by 128 columns (`block`), by 32 (`mxfp8`), and not at all with `int8`. Scales and what is rounded
are those of SGLang's Triton kernel (`tests/workbench/test_quality.py` runs it in Triton's interpreter); the products
after it are made in bf16. `stock (GPU)` is what stock SGLang chooses on NVIDIA GPUs, linear layers per channel and
experts per tensor; without a GPU it is `tensor`. A scheme is marked **pointless** if its loss is certainly (by two
standard errors) above that of `stock (GPU)` and the model is not smaller. Training runs on one thread; its minutes are
wall time, whatever else the machine was doing.

{versions}"""


def _summary(found: Sequence[Quality]) -> Iterator[str]:
    bf16 = next(quality for quality in found if quality.contender == BF16)
    stock = next(quality for quality in found if quality.contender == STOCK)
    yield "| Scheme | Model | Perplexity | +loss, 10⁻³ nats | vs stock (GPU), 10⁻³ nats | + activations, 10⁻³ nats | |"
    yield "|---|---:|---:|---:|---:|---:|---|"
    for quality in found:
        mark = "**pointless**" if is_pointless(quality, stock) else ""
        yield (
            f"| {quality.contender.name} | {bytes_text(quality.model_bytes)} | {quality.perplexity:.4f} | "
            f"{_thousandths(quality.losses, bf16.losses)} | {_thousandths(quality.losses, stock.losses)} | "
            f"{_thousandths(quality.with_activations, quality.losses)} | {mark} |"
        )


def _thousandths(losses: Sequence[float], others: Sequence[float]) -> str:
    if losses is others:
        return "-"
    found = difference(losses, others)
    return f"{found.mean * 1e3:+.2f} ± {found.error * 1e3:.2f}"


def _layers(found: Sequence[Quality]) -> Iterator[str]:
    quantized = [quality for quality in found if quality.layers]
    yield f"| Layer | {' | '.join(quality.contender.name for quality in quantized)} |"
    yield f"|---|{'---:|' * len(quantized)}"
    names = dict.fromkeys(layer.name for quality in quantized for layer in quality.layers)
    for name in names:
        cells = [_cell({layer.name: layer for layer in quality.layers}.get(name)) for quality in quantized]
        yield f"| {name.removeprefix('model.').removesuffix('.weight')} | {' | '.join(cells)} |"
    for part, text in _PARTS.items():
        medians = [[median_ratio(quality.layers, text, kind) for kind in ("weight", "output")] for quality in quantized]
        cells = [f"{weight:.1f} / {output:.1f}" for weight, output in medians]
        yield f"| **median, {part}** | {' | '.join(cells)} |"


def _cell(layer: Any) -> str:
    if layer is None:
        return "bf16"
    return f"{layer.weight:.1f} / {'-' if layer.output is None else format(layer.output, '.1f')}"


def draw(results: Results, file: Path) -> None:
    """Draw one row per model: each layer's output error, and the loss above bf16."""
    figure = empty_figure(11, 4.2 * len(results))
    panels = figure.subplots(len(results), 2, squeeze=False, width_ratios=(3, 1))
    for (family, found), (left, right) in zip(results.items(), panels, strict=True):
        _draw_layers(left, found)
        _draw_loss(right, found)
        left.set_title(family, loc="left", color=INK, fontsize=11)
        for panel in (left, right):
            dress(panel)
    panels[0][0].legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3)
    figure.savefig(file, format="png", dpi=130)


def _draw_layers(panel: Any, found: Sequence[Quality]) -> None:
    for number, quality in enumerate(found):
        values = [(layer.name, layer.output) for layer in quality.layers if layer.output is not None]
        if values:
            names, ratios = zip(*values, strict=True)
            short = [
                name.removeprefix("model.layers.").removesuffix(".weight").replace("self_attn.", "") for name in names
            ]
            panel.plot(
                short, ratios, _MARKERS[number], color=_COLOURS[number], markersize=5, label=quality.contender.name
            )
    panel.set_ylabel("signal to noise of the output, dB", color=INK)
    panel.tick_params(axis="x", rotation=90, labelsize=7)


def _draw_loss(panel: Any, found: Sequence[Quality]) -> None:
    bf16 = found[0]
    for number, quality in enumerate(found[1:], 1):
        against = difference(quality.losses, bf16.losses)
        panel.errorbar(
            [quality.contender.name],
            [against.mean * 1e3],
            yerr=[2 * against.error * 1e3],
            fmt=_MARKERS[number],
            color=_COLOURS[number],
            capsize=3,
        )
    panel.axhline(0, color=INK, linewidth=1)
    panel.set_ylabel("loss above bf16, 10⁻³ nats a token", color=INK)
    panel.tick_params(axis="x", rotation=60, labelsize=8)
