# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a checkpoint from its ``config.json`` alone.

transformers builds its own model on the meta device, and lists the names it would save it under: those of the published
checkpoint. Weights that its model does not have (DeepSeek-V3's multi-token prediction layer) are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sglang_overlay.core.messages import sentence
from sglang_overlay.offline.plan.checkpoint import Checkpoint, CheckpointError, TensorHeader, split_into_files

FILE_BYTES = 5 * 10**9
"""Size of the files that ``save_pretrained`` splits a model into."""


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
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the model of {folder / 'config.json'}, so its "
            f"weights' names and shapes are unknown: {sentence(error)} Use a folder that has the checkpoint's headers."
        ) from error
    saved = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        saved.pop("lm_head.weight", None)
    tensors = [TensorHeader(name, tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()]
    files = split_into_files(sorted(tensors, key=lambda tensor: _place(tensor.name)), FILE_BYTES)
    return Checkpoint(files, f"config.json (names and shapes from transformers {transformers.__version__})")


def _place(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key of model order: embeddings, then layers by number, then what follows them."""
    parts = name.split(".")
    return tuple((int(part), "") if part.isdigit() else (_RANK.get(part, 0), part) for part in parts)


_RANK = {"embed_tokens": -1, "norm": 1, "lm_head": 2}
"""Position of names that stand beside ``layers``; all others come in between."""
