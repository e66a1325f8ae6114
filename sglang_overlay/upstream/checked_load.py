# SPDX-License-Identifier: Apache-2.0
"""A load that makes sure that the checkpoint held every weight that is streamed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sglang_overlay.core.errors import annotate
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.stream import ParameterStream
from sglang_overlay.upstream.checkpoint_files import file_problems
from sglang_overlay.upstream.findings import Findings, Tolerance
from sglang_overlay.upstream.load import ModelLoad, current


class CheckedLoad(ModelLoad):
    """As ``ModelLoad``; a weight that is missing is an error that names it.

    Args:
        tolerance: what the user allows.
    """

    def __init__(
        self,
        tolerance: Tolerance,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(obstacle, excluded)
        self._tolerance = tolerance
        self._findings = Findings()
        self._seen: set[str] = set()

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor of the checkpoint, before the model gets it."""
        self._seen.add(name)
        self.sources.offer(tensor, name)

    @property
    def warnings(self) -> list[str]:
        """What was found wrong with the checkpoint, and is served all the same."""
        return self._findings.warnings

    def check(self, model: torch.nn.Module, model_config: Any) -> None:
        """As ``ModelLoad.check``, and everything was written from the checkpoint.

        Raises:
            IncompleteLoadError: units were never completely written.
            NonFiniteWeightError: a weight is not finite, where that is an error.
            MisfitError: a tensor does not fill its part of a weight, where that is an error.
        """
        folder = Path(model_config.model_path)
        self._findings.conclude_misfits(self._tolerance, folder, model_config.hf_config.to_dict())
        self._findings.conclude(self._tolerance, self._seen, folder)
        super().check(model, model_config)

    def _settle(self, stream: LayerStream) -> None:
        self._findings.misfits += stream.misfits
        super()._settle(stream)

    def _note(self, layer: str, part: ParameterStream, missing: Sequence[int]) -> None:
        self._findings.note(layer, part, missing)


def get_all_weights(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Around ``DefaultModelLoader._get_all_weights``."""
    load = current()
    if not isinstance(load, CheckedLoad):
        yield from original(*args, **kwargs)
        return
    try:
        for name, tensor in original(*args, **kwargs):
            load.see(name, tensor)
            yield name, tensor
    except Exception as error:
        # Not what the model raises: that ends this generator with GeneratorExit.
        folder = Path(inspect.signature(original).bind(*args, **kwargs).arguments["model_config"].model_path)
        for problem in file_problems(folder):
            annotate(error, f"StreamFP8: {folder}: {problem}")
        raise
