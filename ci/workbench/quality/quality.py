# SPDX-License-Identifier: Apache-2.0
"""Measure what each scheme costs in quality: perplexity on held-out text, and errors of weights and outputs.

Everything comes from models that real SGLang has loaded: logprobs are its server's, weights are the served ones, read
back from what its ``ShardedStateLoader`` saves, and layers' inputs are those of the bf16 model on the same text.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sglang_overlay.settings import MODE_VARIABLE, SCHEME_VARIABLE
from workbench.loads import serving
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadWorkers
from workbench.quality import activations
from workbench.quality.corpus import windows
from workbench.quality.small_models import SmallModel

RECORDED_WINDOWS = 8
"""The layers whose inputs are kept."""
SERVER_SECONDS = 600.0

Windows = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Contender:
    """A way of serving a model.

    Attributes:
        name: for tables.
        quantization: as ``--quantization``.
        scheme: as ``SGLANG_STREAMFP8_SCHEME``.
        activations: how a GPU rounds what weights are multiplied with, as for ``activations.VARIABLE``.
    """

    name: str
    quantization: str | None
    scheme: str
    activations: str


BF16 = Contender("bf16", None, "stock", "none,none")
STOCK = Contender("stock (GPU)", "fp8", '{"linear": "channel", "moe": "tensor"}', "token,tensor")
"""The scheme that stock SGLang uses on NVIDIA GPUs."""

CONTENDERS = (
    BF16,
    STOCK,
    Contender("tensor", "fp8", "tensor", "token,tensor"),
    Contender("channel", "fp8", "channel", "token,token"),
    Contender("block", "fp8", "block", "block,block"),
    Contender("mxfp8", "mxfp8", "stock", "mxfp8,mxfp8"),
    Contender("int8 experts", "fp8", '{"linear": "channel", "moe": "int8"}', "token,none"),
)


@dataclass(frozen=True)
class LayerError:
    """Signal to quantization noise of one quantized weight, in dB.

    Attributes:
        weight: ratio for the weight itself.
        output: ratio for the product with the layer's input; None for a weight that is not multiplied with it.
    """

    name: str
    weight: float
    output: float | None


@dataclass(frozen=True)
class Quality:
    """One contender's figures.

    Attributes:
        losses: mean loss of each window, in nats per token; activations are in the model's dtype.
        with_activations: the same with activations that are rounded as on a GPU; for bf16 the same.
        model_bytes: bytes of the loaded model.
        layers: errors of the quantized layers.
    """

    contender: Contender
    losses: tuple[float, ...]
    with_activations: tuple[float, ...]
    model_bytes: int
    layers: tuple[LayerError, ...]

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(statistics.fmean(self.losses))


@dataclass(frozen=True)
class Difference:
    """Difference of one contender's loss from another's on the same windows, in nats per token.

    Attributes:
        mean: above zero if the first is worse.
        error: standard error of the mean.
    """

    mean: float
    error: float

    @property
    def is_certain(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return abs(self.mean) > 2 * self.error


def measure(model: SmallModel, workers: LoadWorkers, logs: Path, length: int, count: int) -> Iterator[Quality]:
    """Measure all contenders on one model, over ``count`` windows of ``length`` tokens of held-out text.

    Args:
        model: the model to measure.
        workers: load the model to read its weights and layers' inputs.
        logs: folder for the servers' logs.
        length: tokens of a window.
        count: number of windows.

    Raises:
        ServerError: a server did not start, or did not answer.
    """
    text = tuple(tuple(window) for window in windows(model.held_out, length, count).tolist())
    with tempfile.TemporaryDirectory() as scratch:
        inputs, original = Path(scratch) / "inputs", Path(scratch) / "original"
        for number, contender in enumerate(CONTENDERS):
            is_original = contender is BF16
            state = original if is_original else Path(scratch) / f"quantized-{number}"
            state.mkdir()
            job = LoadJob(
                model.folder,
                quantization=contender.quantization,
                environ={SCHEME_VARIABLE: contender.scheme},
                prompts=text[:RECORDED_WINDOWS] if is_original else (),
                new_tokens=1,
                recorded_inputs=inputs if is_original else None,
                save_sharded_state=state,
                server_args={"max_total_tokens": 2 * RECORDED_WINDOWS * length},
                timeout_seconds=1800,
            )
            model_bytes = workers.load(job).ranks[0].model_bytes
            errors = () if is_original else layer_errors(_tensors(original), _tensors(state), load_file(inputs))
            log = logs / f"{model.family}-{number}.log"
            losses = rounded = served_losses(model.folder, contender, text, log)
            if not is_original:
                rounded = served_losses(model.folder, contender, text, log, with_activations=True)
            yield Quality(contender, losses, rounded, model_bytes, tuple(errors))


def served_losses(
    model: Path, contender: Contender, text: Windows, log: Path, *, with_activations: bool = False
) -> tuple[float, ...]:
    """Mean loss of each window, in nats per token, from the logprobs that a server returns.

    Args:
        model: folder of the checkpoint.
        contender: how it is served.
        text: the windows.
        log: file for the server's log.
        with_activations: round activations as on a GPU.

    Raises:
        ServerError: the server did not start, or did not answer.
    """
    port = serving.free_port()
    quantization = () if contender.quantization is None else ("--quantization", contender.quantization)
    command = serving.sglang_command(sys.executable, str(model), port, (*quantization, "--device", "cpu"))
    variables = {MODE_VARIABLE: "require", SCHEME_VARIABLE: contender.scheme}
    if with_activations:
        command = tuple(activations.__name__ if word == "sglang.launch_server" else word for word in command)
        variables |= {activations.VARIABLE: contender.activations, "PYTHONPATH": os.pathsep.join(sys.path)}
    with serving.running(serving.Launch(command, port, log, variables), SERVER_SECONDS) as url:
        # One at a time: other windows in the same batch would change the rounding.
        found = [serving.input_logprobs(url, [window])[0] for window in text]
    return tuple(-statistics.fmean(window) for window in found)


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """How much higher losses of the same windows are."""
    found = [a - b for a, b in zip(one, other, strict=True)]
    return Difference(statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found)))


def is_pointless(found: Quality, stock: Quality) -> bool:
    """Whether a contender is certainly worse than stock without being smaller."""
    worse = difference(found.losses, stock.losses)
    return bool(found.layers) and worse.is_certain and worse.mean > 0 and found.model_bytes >= stock.model_bytes


def layer_errors(
    original: Mapping[str, torch.Tensor], quantized: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> Iterator[LayerError]:
    """Errors, against float64, of every weight that has a different dtype in the quantized model.

    Args:
        original: parameters of the bf16 model, by name.
        quantized: parameters of the quantized model, by name.
        inputs: inputs of layers, ``[rows, columns]``, by the layer's name.
    """
    for name, weight in original.items():
        if name not in quantized or quantized[name].dtype == weight.dtype:
            continue
        exact, rounded = weight.double(), dequantized(name, quantized)
        layer, _, last = name.rpartition(".")
        given = inputs.get(layer)
        if given is not None and last == "w2_weight":
            given = _hidden(given.double(), original[f"{layer}.w13_weight"].double())
        output = None if given is None else _output_ratio(exact, rounded, given.double())
        yield LayerError(name, ratio(exact, rounded), output)


def dequantized(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight multiplied by its scales, float64: ``[N, K]``, experts' ``[E, N, K]``."""
    weight = tensors[name].double()
    if f"{name}_scale_inv" in tensors:
        scale = tensors[f"{name}_scale_inv"]
        if scale.dtype == torch.uint8:
            return weight * torch.exp2(scale.double() - 127).repeat_interleave(32, -1)
        scale = scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
        return weight * scale[..., : weight.shape[-2], : weight.shape[-1]]
    scale = tensors[f"{name}_scale"].double()
    if weight.ndim == 2:
        return weight.t() * scale.reshape(-1, 1)
    return weight * scale.reshape(len(weight), -1, 1)


def ratio(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """Signal to noise in dB."""
    noise = (exact - rounded).square().sum()
    return float(10 * torch.log10(exact.square().sum() / noise))


def _output_ratio(exact: torch.Tensor, rounded: torch.Tensor, given: torch.Tensor) -> float:
    return ratio(given @ exact.transpose(-1, -2), given @ rounded.transpose(-1, -2))


def _hidden(given: torch.Tensor, w13: torch.Tensor) -> torch.Tensor:
    """Input of w2, ``[E, rows, I]``, if every token were sent to every expert."""
    gate, up = (given @ w13.transpose(-1, -2)).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def median_ratio(layers: Sequence[LayerError], part: str, kind: str) -> float:
    """Median ``weight`` or ``output`` ratio (``kind``) of layers whose names contain ``part``."""
    found = [getattr(layer, kind) for layer in layers if part in layer.name]
    known = [float(value) for value in found if value is not None]
    return statistics.median(known or [math.nan])
