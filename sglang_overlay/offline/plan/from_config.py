# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a checkpoint from its ``config.json`` alone.

transformers builds its own model on the meta device, and lists the names it would save it under: those of the published
checkpoint. Weights that its model does not have (DeepSeek-V3's multi-token prediction layer) are missing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.core.messages import sentence
from sglang_overlay.offline.plan.checkpoint import Checkpoint, CheckpointError, TensorHeader, split_into_files

FILE_BYTES = 5 * 10**9
"""Size of the files that ``save_pretrained`` splits a model into."""


_AS_BUILT = frozenset({"Qwen3_5MoeForConditionalGeneration"})
"""Published with a layer's experts in one tensor, as transformers' model has them; it would save them one by one."""

_TRANSPOSED = frozenset({"Qwen3VLMoeForConditionalGeneration"})
"""Published with inputs before outputs in the experts' tensors; transformers reads these, and saves the other order."""

_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")


def from_config(folder: Path) -> Checkpoint:
    """The checkpoint that belongs to the ``config.json`` in a folder, in model order.

    Raises:
        CheckpointError: transformers does not know the model.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, written.get("torch_dtype") or written.get("dtype") or "bfloat16")
    try:
        with torch.device("meta"):
            model = _model(written["architectures"][0], folder, dtype)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the model of {folder / 'config.json'}, so its "
            f"weights' names and shapes are unknown: {sentence(error)} Use a folder that has the checkpoint's headers."
        ) from error
    held = model.state_dict()
    saved = held if type(model).__name__ in _AS_BUILT else revert_weight_conversion(model, held)
    if type(model).__name__ in _TRANSPOSED:
        saved = {name: tensor.mT if _EXPERTS.search(name) else tensor for name, tensor in saved.items()}
    if model.config.tie_word_embeddings:
        saved.pop("lm_head.weight", None)
    tensors = [TensorHeader(name, tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()]
    files = split_into_files(sorted(tensors, key=lambda tensor: _place(tensor.name)), FILE_BYTES)
    return Checkpoint(files, f"config.json (names and shapes from transformers {transformers.__version__})")


def _model(architecture: str, folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a configuration, by the name in it: no automatic class has all of images and text."""
    import transformers

    named = getattr(transformers, architecture, None)
    if named is None:
        config = transformers.AutoConfig.from_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # The class's own configuration also reads a model_type that transformers does not know, such as Kimi K2's, but
    # keeps it, and names are looked up by it.
    config = named.config_class.from_pretrained(folder)
    config.model_type = named.config_class.model_type
    return named._from_config(config, dtype=dtype)


def _place(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key of model order: embeddings, then layers by number, then what follows them."""
    parts = name.split(".")
    return tuple((int(part), "") if part.isdigit() else (_RANK.get(part, 0), part) for part in parts)


_RANK = {"embed_tokens": -1, "norm": 1, "lm_head": 2}
"""Position of names that stand beside ``layers``; all others come in between."""
