# SPDX-License-Identifier: Apache-2.0
"""Give a trained model outlier channels, as large models develop them, without changing what it computes.

A channel between two operations that are linear in it is scaled up before and down after by the same power of two, or
the other way round; bf16 and float32 represent that exactly. For channels of a norm, these are its weight and the
columns of the projections that read it; inside a feed-forward network, the up projection's rows and the down
projection's columns. So there are outliers among activations and among weights.

Large models: Dettmers et al., "LLM.int8()", arXiv 2208.07339 (a few channels, magnitudes up to 20 times the rest);
Xiao et al., "SmoothQuant", arXiv 2211.10438, which moves magnitude between activations and weights in this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

FACTORS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 8.0, 16.0, 32.0, 64.0)
ONE_IN = 64
"""One channel in this many is an outlier."""

_READ_BY = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "q_a_layernorm": ("q_b_proj",),
    "kv_a_layernorm": ("kv_b_proj",),
    "post_attention_layernorm": ("gate", "gate_proj", "up_proj"),
}
"""The projections that read each norm's output, by the last part of the norm's name before ``weight``."""

_INSIDE = {"input_layernorm": ".self_attn", "post_attention_layernorm": ".mlp"}
"""Where those are, relative to the module that has the norm."""


def add_outliers(tensors: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint's tensors, under published names, with outlier channels."""
    made = {name: tensor.clone() for name, tensor in tensors.items()}
    chance = torch.Generator().manual_seed(seed)
    for name in sorted(made):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in _READ_BY:
            _scale_normed(made, name, tuple(_readers(made, module)), chance)
        elif module.endswith(".up_proj"):
            _scale_hidden(made, name, chance)
    return made


def _readers(tensors: Mapping[str, torch.Tensor], norm: str) -> Iterator[str]:
    parent, _, last = norm.rpartition(".")
    parent += _INSIDE.get(last, "")
    for name in tensors:
        if name.startswith(f"{parent}.") and name.removesuffix(".weight").rpartition(".")[2] in _READ_BY[last]:
            yield name


def _scale_normed(tensors: dict[str, torch.Tensor], norm: str, readers: Sequence[str], chance: torch.Generator) -> None:
    factors = _factors(tensors[norm].shape[0], chance)
    tensors[norm].div_(factors)
    for reader in readers:
        tensors[reader].mul_(factors)


def _scale_hidden(tensors: dict[str, torch.Tensor], up: str, chance: torch.Generator) -> None:
    down = up.replace(".up_proj.", ".down_proj.")
    factors = _factors(tensors[up].shape[0], chance)
    tensors[up].mul_(factors.unsqueeze(1))
    tensors[down].div_(factors)


def _factors(channels: int, chance: torch.Generator) -> torch.Tensor:
    """Ones ``[channels]``, but one in ``ONE_IN`` is another power of two."""
    factors = torch.ones(channels)
    count = max(1, channels // ONE_IN)
    places = torch.randperm(channels, generator=chance)[:count]
    choice = torch.randint(len(FACTORS), (count,), generator=chance)
    factors[places] = torch.tensor(FACTORS)[choice]
    return factors
