# SPDX-License-Identifier: Apache-2.0
"""What a load sees of its checkpoint: whether that held every weight that is streamed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.quantization.streaming_fp8.checkpoint_files import CheckpointFiles
from sglang.srt.layers.quantization.streaming_fp8.diagnostics import (
    Diagnostics,
    Read,
    Tolerance,
    WantedShapes,
    Weight,
    kept_misfits,
)
from sglang.srt.layers.quantization.streaming_fp8.layer import LayerStream
from sglang.srt.layers.quantization.streaming_fp8.model_load import current
from sglang.srt.layers.quantization.streaming_fp8.sources import oddity
from sglang.srt.layers.quantization.streaming_fp8.tensor_names import Misplaced


class CheckpointWatch:
    """Sees what a load reads, and names in the end what is missing or damaged.

    Args:
        tolerance: what the user allows.

    Attributes:
        files: that upstream reads.
        wanted: what the model wants of its checkpoint's tensors, once they have been read.
    """

    def __init__(self, tolerance: Tolerance) -> None:
        self.files = CheckpointFiles()
        self.wanted = WantedShapes()
        self._tolerance = tolerance
        self._diagnostics = Diagnostics()
        self._seen: dict[str, str | None] = {}

    def reading(self) -> AbstractContextManager[None]:
        """Around all of upstream's load."""
        return self.files.noted()

    def see(self, name: str, tensor: object) -> None:
        """Note an entry of the checkpoint, before the model gets it."""
        # What was read last comes last.
        self._seen.pop(name, None)
        self._seen[name] = oddity(tensor)

    def explain(self, streams: Sequence[LayerStream]) -> Iterator[str]:
        """What an error that ended the load of ``streams`` does not say itself."""
        last = next(reversed(self._seen), "")
        if self._seen.get(last):
            yield f"the checkpoint's entry that was read last, {last}, is {self._seen[last]}"
        if not any(part.origins() for stream in streams for part in stream.streams.values()):
            advice = Misplaced.among(self._seen, [stream.name for stream in streams]).advice
            if advice:
                yield f"the model did not load any weight so far. {advice}"

    def note_misfits(self, stream: LayerStream) -> None:
        """Take over which tensors did not fill their part of a layer's weights."""
        self._diagnostics.misfits += kept_misfits(stream.name, stream.misfits, stream.placeholders)

    def note(self, layer: str, weight: Weight, missing: Sequence[int]) -> None:
        """Take over what a finished weight of ``layer`` knows; ``missing`` are units never completely written."""
        self._diagnostics.note(layer, weight, missing)

    def conclude(self, model: torch.nn.Module, model_config: Any) -> None:
        """Say what is wrong with the checkpoint.

        Raises:
            IncompleteLoadError: units were never completely written.
            NonFiniteWeightError: a weight is not finite, where that is an error.
            MisfitError: a tensor does not fill its part of a weight, where that is an error.
        """
        self.wanted = self._diagnostics.wanted(Path(model_config.model_path), model_config.hf_config.to_dict())
        held = {name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors}
        read, folder = Read(self._seen, held), self.files.in_folder(model_config.model_path)
        self._diagnostics.conclude_misfits(self._tolerance, self.wanted)
        self._diagnostics.conclude(self._tolerance, read, folder)


def get_all_weights(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Around ``DefaultModelLoader._get_all_weights``."""
    load = current()
    if load is None or load.checkpoint is None:
        yield from original(*args, **kwargs)
        return
    model_config = inspect.signature(original).bind(*args, **kwargs).arguments["model_config"]
    # Not to what the model raises: that ends this generator with GeneratorExit.
    with load.checkpoint.files.problems_added(model_config.model_path):
        for name, tensor in original(*args, **kwargs):
            load.see(name, tensor)
            yield name, tensor
