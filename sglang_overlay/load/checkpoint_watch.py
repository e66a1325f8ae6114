# SPDX-License-Identifier: Apache-2.0
"""What a load sees of its checkpoint: whether that held every weight that is streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.core.errors import UnsupportedDtypeError
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.messages import shortened
from sglang_overlay.core.sources import oddity
from sglang_overlay.core.tensor_names import Misplaced
from sglang_overlay.load import eligibility
from sglang_overlay.load.checkpoint_files import CheckpointFiles
from sglang_overlay.load.diagnostics import Diagnostics, Read, Tolerance, WantedShapes, Weight, kept_misfits
from sglang_overlay.load.stored_dtypes import NOT_SAID, QUANTIZED
from sglang_overlay.load.unstreamed import UnstreamedParameters


class CheckpointWatch:
    """Sees what a load reads, and names in the end what is missing or damaged.

    Args:
        tolerance: what the user allows.

    Attributes:
        files: that upstream reads.
        wanted: what the model wants of its checkpoint's tensors, once they have been read.
        missing: parameters that were not completely written from the checkpoint.
    """

    def __init__(self, tolerance: Tolerance) -> None:
        self.files = CheckpointFiles()
        self.wanted = WantedShapes()
        self.missing: list[str] = []
        self._tolerance = tolerance
        self._diagnostics = Diagnostics()
        self._seen: dict[str, str | None] = {}
        self._quantized: list[str] = []

    @property
    def warnings(self) -> list[str]:
        """What was found wrong with the checkpoint, and is served all the same."""
        return self._diagnostics.warnings

    def warn(self, text: str) -> None:
        """Log ``text``, and keep it in ``warnings``."""
        self._diagnostics.warn(text)

    def reading(self) -> AbstractContextManager[None]:
        """Around all of upstream's load."""
        return self.files.noted()

    def see(self, name: str, tensor: object) -> None:
        """Note an entry of the checkpoint, before the model gets it."""
        # What was read last comes last.
        self._seen.pop(name, None)
        self._seen[name] = oddity(tensor)
        if isinstance(tensor, torch.Tensor) and tensor.dtype in QUANTIZED:
            self._quantized.append(name)

    def explain(self, streams: Sequence[LayerStream], *, was_read: bool) -> Iterator[str]:
        """What an error that ended the load of ``streams`` does not say itself.

        Args:
            streams: the layers that were being streamed.
            was_read: whether anything was loaded into other layers.
        """
        last = next(reversed(self._seen), "")
        if self._seen.get(last):
            yield f"the checkpoint's entry that was read last, {last}, is {self._seen[last]}"
        if not was_read and not any(part.origins() for stream in streams for part in stream.streams.values()):
            advice = Misplaced.among(self._seen, [stream.name for stream in streams]).advice
            if advice:
                yield f"the model did not load any weight so far. {advice}"

    def note_misfits(self, stream: LayerStream) -> None:
        """Take over which tensors did not fill their part of a layer's weights."""
        self._diagnostics.misfits += kept_misfits(stream.name, stream.misfits, stream.placeholders)

    def note(self, layer: str, weight: Weight, missing: Sequence[int]) -> None:
        """Take over what a finished weight of ``layer`` knows; ``missing`` are units never completely written."""
        self.missing += [weight.name] if missing else []
        self._diagnostics.note(layer, weight, missing)

    def note_unstreamed(self, parameters: UnstreamedParameters, model_config: Any) -> None:
        """Say which parameters that are not quantized were not loaded, or are not finite."""
        missing = parameters.missing(model_config)
        self.missing += missing
        for text in parameters.problems(missing):
            self.warn(text)

    def tell_quantized(self, *, is_error: bool) -> None:
        """Say that an online load read tensors of fp8, if it did.

        No weight loader got them as they are, or it would have refused: the model has cast or dropped them.

        Raises:
            UnsupportedDtypeError: where that is an error.
        """
        if not self._quantized:
            return
        text = f"the checkpoint holds {len(self._quantized)} tensors of fp8: {shortened(self._quantized)}. {NOT_SAID}"
        if is_error:
            raise UnsupportedDtypeError(text)
        self.warn(text.removesuffix("."))

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
        self._diagnostics.conclude_unused(partial(eligibility.shares_keys_and_values, model))
        self._diagnostics.conclude(self._tolerance, read, folder)
