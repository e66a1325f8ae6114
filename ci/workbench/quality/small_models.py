# SPDX-License-Identifier: Apache-2.0
"""Small trained models in published formats, so that it is worth measuring what quantization does to them.

    model = trained("qwen3_moe", Recipe(), cache_root() / "quality")

Training is seeded and uses a fixed number of threads, on the text of ``corpus.py``; nothing is downloaded. Trained
models are kept in a folder whose name depends on the recipe, the code, and the versions that affect the result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from workbench.loads.checkpoints import CheckpointSpec, Family, model_config, save_tokenizer, torch_threads
from workbench.quality import corpus, outliers
from workbench.quality.corpus import Corpus, read_corpus

FAMILIES: tuple[Family, ...] = ("qwen3_moe", "deepseek_v3")
VOCAB_SIZE = 1024
_OVERRIDES: dict[Family, tuple[tuple[str, Any], ...]] = {
    "qwen3_moe": (("vocab_size", VOCAB_SIZE),),
    "deepseek_v3": (("vocab_size", VOCAB_SIZE), ("intermediate_size", 512), ("q_lora_rank", 128)),
}
"""Changes to the tiny checkpoints' configs; all quantized sizes are multiples of 128."""

Told = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the loss."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: optimizer steps.
        batch: sequences a step.
        length: tokens a sequence.
        rate: peak learning rate.
        threads: number of torch's threads, which affects rounding; more than one is little faster at this size.
        seed: of weights, batches and outliers.
    """

    steps: int = 600
    batch: int = 8
    length: int = 256
    rate: float = 3e-3
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class SmallModel:
    """A trained checkpoint.

    Attributes:
        held_out: int64 ``[tokens]``, text that it has not seen.
        seconds: duration of its training.
        loss: mean over the last tenth of the steps, in nats per token.
    """

    family: Family
    folder: Path
    held_out: torch.Tensor
    seconds: float
    loss: float


def trained(family: Family, recipe: Recipe, cache: Path, told: Told) -> SmallModel:
    """The model of a family, trained now unless it was before."""
    folder = cache / f"{family}-{_key(family, recipe)}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".training-", dir=cache) as scratch:
            draft = Path(scratch) / folder.name
            _train(family, recipe, draft, told)
            draft.rename(folder)
    facts = json.loads((folder / "training.json").read_text())
    held_out = load_file(folder / "held_out.tokens")["tokens"]
    return SmallModel(family, folder, held_out, facts["seconds"], facts["loss"])


def spec_of(family: Family) -> CheckpointSpec:
    """The checkpoint's spec: its config, and its tensors' names and shapes."""
    return CheckpointSpec(family, overrides=_OVERRIDES[family])


def _key(family: Family, recipe: Recipe) -> str:
    sources = [Path(str(module)).read_text() for module in (__file__, corpus.__file__, outliers.__file__)]
    versions = [platform.python_version(), *map(version, ("torch", "transformers", "tokenizers"))]
    described = json.dumps([family, model_config(spec_of(family)), asdict(recipe), versions, sources], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _train(family: Family, recipe: Recipe, folder: Path, told: Told) -> None:
    text = read_corpus(VOCAB_SIZE)
    torch.manual_seed(recipe.seed)
    config = model_config(spec_of(family))
    model = build_model(config)
    began = time.perf_counter()
    with torch_threads(recipe.threads):
        losses = list(_steps(model, text, recipe, told))
    seconds = time.perf_counter() - began
    last = losses[-max(1, len(losses) // 10) :]
    model.to(torch.bfloat16).save_pretrained(folder)
    weights = folder / "model.safetensors"
    plain = load_file(weights)
    save_file(outliers.add_outliers(plain, recipe.seed), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(text.tokenizer, folder)
    save_file({"tokens": text.held_out}, folder / "held_out.tokens")
    facts = {
        "recipe": asdict(recipe),
        "seconds": seconds,
        "loss": sum(last) / len(last),
        "parameters": sum(tensor.numel() for tensor in plain.values()),
        "tokens_trained_on": recipe.steps * recipe.batch * recipe.length,
        "tokens_of_text": len(text.train),
        "cores": len(os.sched_getaffinity(0)),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def build_model(config: dict[str, Any]) -> Any:
    """A transformers model with random weights, in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    return AutoModelForCausalLM.from_config(found, dtype=torch.float32, attn_implementation="sdpa")


def _steps(model: Any, text: Corpus, recipe: Recipe, told: Told) -> Iterator[float]:
    """Train, yielding each step's loss in nats per token."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
    chance = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(step, recipe.steps)
        starts = torch.randint(len(text.train) - recipe.length, (recipe.batch,), generator=chance)
        batch = torch.stack([text.train[start : start + recipe.length] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told(step + 1, recipe.steps, loss.item())
        yield loss.item()


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over a tenth, then half a cosine down to a tenth of the peak."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
