# SPDX-License-Identifier: Apache-2.0
"""What a loaded model thinks of text: SGLang's own input logprobs, and what its layers are given meanwhile.

Runs in the worker process, on its ``ModelRunner``; the logprobs are those that a server returns as
``input_token_logprobs``.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workbench import runtime

BATCH = 8
ROWS = 512
"""Rows of a layer's input that are kept."""

Windows = Sequence[tuple[int, ...]]


def score(runner: Any, windows: Windows, recorded: Path | None) -> tuple[tuple[float, ...], ...]:
    """Logprobs in nats of each window's tokens but the first.

    Args:
        runner: with memory pools and attention backend ready, and ``logits_output`` of its last forward pass.
        windows: token ids, all of one length.
        recorded: where the first batch's inputs of layers go, if anywhere.
    """
    found: list[tuple[float, ...]] = []
    for start in range(0, len(windows), BATCH):
        with recorded_inputs(runner.model, recorded if start == 0 else None):
            found += _score_batch(runner, windows[start : start + BATCH])
    return tuple(found)


def _score_batch(runner: Any, windows: Windows) -> Iterator[tuple[float, ...]]:
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    runtime.one_batch.extend([_request(number, window) for number, window in enumerate(windows)], runner)
    logprobs = runner.logits_output.input_token_logprobs.float().cpu().view(len(windows), -1)
    # The last one is of a token that there is not.
    return (tuple(row[:-1]) for row in logprobs.tolist())


def _request(number: int, tokens: tuple[int, ...]) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    request = Req(
        rid=str(number),
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        return_logprob=True,
    )
    runtime.mark_extended(request)
    request.logprob_start_len = 0
    return request


@contextlib.contextmanager
def recorded_inputs(model: torch.nn.Module, file: Path | None) -> Iterator[None]:
    """Write the first ``ROWS`` rows that each linear and expert layer is given, ``[rows, columns]``, by its name."""
    kept: dict[str, torch.Tensor] = {}
    hooks = [] if file is None else [_hook(name, layer, kept) for name, layer in _layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if file is not None:
        save_file(kept, file)


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        if {"weight", "w13_weight"} & set(module._parameters) and hasattr(module, "quant_method"):
            yield name, module


def _hook(name: str, layer: torch.nn.Module, kept: dict[str, torch.Tensor]) -> Any:
    def keep(_layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is not None and given.is_floating_point():
            kept.setdefault(name, given.reshape(-1, given.shape[-1])[:ROWS].float().clone())

    return layer.register_forward_pre_hook(keep, with_kwargs=True)
