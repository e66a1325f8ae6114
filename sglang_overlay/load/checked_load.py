# SPDX-License-Identifier: Apache-2.0
"""A load that makes sure that the checkpoint held every weight that is streamed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sglang_overlay.core.executor import Executor
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.sources import oddity
from sglang_overlay.core.stream import ParameterStream
from sglang_overlay.core.tensor_names import Misplaced
from sglang_overlay.load.checkpoint_files import CheckpointFiles
from sglang_overlay.load.diagnostics import Diagnostics, Read, Tolerance, WantedShapes, kept_misfits
from sglang_overlay.load.model_load import ModelLoad, current


class CheckedLoad(ModelLoad):
    """As ``ModelLoad``; a weight that is missing is an error that names it.

    Args:
        tolerance: what the user allows.

    Attributes:
        files: that upstream reads.
        wanted: what the model wants of its checkpoint's tensors, once they have been read.
    """

    def __init__(
        self,
        tolerance: Tolerance,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
        executor: Executor | None = None,
    ) -> None:
        super().__init__(obstacle, excluded, executor)
        self._tolerance = tolerance
        self.files = CheckpointFiles()
        self.wanted = WantedShapes()
        self._diagnostics = Diagnostics()
        self._seen: dict[str, str | None] = {}

    def see(self, name: str, tensor: object) -> None:
        """Note an entry of the checkpoint, before the model gets it."""
        # What was read last comes last.
        self._seen.pop(name, None)
        self._seen[name] = oddity(tensor)
        self.sources.offer(tensor, name)

    def reading(self) -> AbstractContextManager[None]:
        return self.files.noted()

    def explain(self, error: Exception) -> Iterator[str]:
        yield from super().explain(error)
        last = next(reversed(self._seen), "")
        if self._seen.get(last):
            yield f"the checkpoint's entry that was read last, {last}, is {self._seen[last]}"
        streams = [stream for stream, _ in self._streams.values()]
        if not any(part.origins() for stream in streams for part in stream.streams.values()):
            advice = Misplaced.among(self._seen, [stream.name for stream in streams]).advice
            if advice:
                yield f"the model did not load any weight so far. {advice}"

    @property
    def warnings(self) -> list[str]:
        """What was found wrong with the checkpoint, and is served all the same."""
        return self._diagnostics.warnings

    def check(self, model: torch.nn.Module, model_config: Any) -> None:
        """As ``ModelLoad.check``, and everything was written from the checkpoint.

        Raises:
            IncompleteLoadError: units were never completely written.
            NonFiniteWeightError: a weight is not finite, where that is an error.
            MisfitError: a tensor does not fill its part of a weight, where that is an error.
        """
        self.wanted = self._diagnostics.wanted(Path(model_config.model_path), model_config.hf_config.to_dict())
        held = {name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors}
        self._diagnostics.conclude_misfits(self._tolerance, self.wanted)
        self._diagnostics.conclude(
            self._tolerance, Read(self._seen, held), self.files.in_folder(model_config.model_path)
        )
        super().check(model, model_config)

    def _settle(self, stream: LayerStream) -> None:
        self._diagnostics.misfits += kept_misfits(stream.name, stream.misfits, stream.placeholders)
        super()._settle(stream)

    def _note(self, layer: str, part: ParameterStream, missing: Sequence[int]) -> None:
        self._diagnostics.note(layer, part, missing)


def get_all_weights(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Around ``DefaultModelLoader._get_all_weights``."""
    load = current()
    if not isinstance(load, CheckedLoad):
        yield from original(*args, **kwargs)
        return
    model_config = inspect.signature(original).bind(*args, **kwargs).arguments["model_config"]
    # Not to what the model raises: that ends this generator with GeneratorExit.
    with load.files.problems_added(model_config.model_path):
        for name, tensor in original(*args, **kwargs):
            load.see(name, tensor)
            yield name, tensor
