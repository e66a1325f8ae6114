# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is exported: its files and their tensors, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from sglang_overlay.core.messages import shortened
from sglang_overlay.core.sources import oddity
from sglang_overlay.errors import ExportError

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INDEX = ".index.json"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint, as its file describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class _Opened(Protocol):
    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped but not read."""

    def keys(self) -> list[str]:
        """Names of the tensors."""


class SourceCheckpoint:
    """A folder with ``config.json`` and weights in ``*.safetensors`` or else ``*.bin`` files.

    Raises:
        ExportError: there is no such checkpoint, or it is quantized already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._read_config()
        self.files = self._weight_files()

    def tensors(self) -> list[SourceTensor]:
        """All tensors, file by file."""
        return [tensor for file in self.files for tensor in self._tensors_in(file)]

    @contextmanager
    def opened(self) -> Iterator[Files]:
        """The files, each opened when first asked for and kept open."""
        with ExitStack() as stack:
            yield Files(self.folder, stack)

    def identity(self) -> list[tuple[str, int, int]]:
        """Name, bytes and modification time (ns) of each file: unchanged if the checkpoint is unchanged."""
        found = [(file, (self.folder / file).stat()) for file in (CONFIG, *self.files)]
        return [(file, status.st_size, status.st_mtime_ns) for file, status in found]

    def others(self) -> list[Path]:
        """Files of the model other than weights and config.json: tokenizer, generation config, code, licence."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and path.name != CONFIG and not path.name.endswith((*_WEIGHTS, _INDEX))
        )

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        if not path.is_file():
            raise ExportError(
                f"{self.folder} is no checkpoint: it has no {CONFIG}. Give the folder of a bf16 checkpoint."
            )
        config = _object_in(path)
        if config.get("quantization_config"):
            method = dict(config["quantization_config"]).get("quant_method", "something")
            raise ExportError(f"{self.folder} is quantized already, by {method}: export starts from a bf16 checkpoint")
        return config

    def _weight_files(self) -> list[str]:
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.folder / f"{stem}.{suffix}{_INDEX}"
            if index.is_file():
                places = _object_in(index).get("weight_map")
                if not isinstance(places, dict):
                    raise ExportError(f"{index} has no weight_map: it is no index of a checkpoint")
                return sorted(set(places.values()))
            found = sorted(path.name for path in self.folder.glob(f"*.{suffix}"))
            if found:
                return found
        raise ExportError(f"{self.folder} has no weights in *.safetensors or *.bin files")

    def _tensors_in(self, file: str) -> Iterator[SourceTensor]:
        with ExitStack() as stack:
            opened = Files(self.folder, stack).open(file)
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                yield SourceTensor(name, tuple(tensor.shape), tensor.dtype, file)


def _object_in(path: Path) -> dict[str, Any]:
    """A JSON file's content.

    Raises:
        ExportError: it is not valid JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON ({error}); was it copied completely?") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds no JSON object; was it copied completely?")
    return content


class Files:
    """Open weight files of a folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._opened: dict[str, _Opened] = {}

    def open(self, file: str) -> _Opened:
        """A file's tensors, mapped: pages are read when they are used, and the system can drop them.

        Raises:
            ExportError: the file cannot be read.
        """
        if file not in self._opened:
            path = self._folder / file
            try:
                self._opened[file] = self._open(path)
            except Exception as error:
                raise ExportError(f"{path} cannot be read: {error}") from error
        return self._opened[file]

    def _open(self, path: Path) -> _Opened:
        if path.suffix == ".safetensors":
            opened: _Opened = self._stack.enter_context(safe_open(path, framework="pt"))
            return opened
        return _TorchFile(torch.load(path, map_location="cpu", mmap=True, weights_only=True))


class _TorchFile:
    """A file of ``torch.save``. Entries that are not tensors (an epoch, a config) are ignored."""

    def __init__(self, entries: dict[str, object]) -> None:
        self._tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        odd = [f"{name} is {found}" for name, value in self._tensors.items() if (found := oddity(value))]
        if odd:
            raise ValueError(f"safetensors files cannot hold all of it: {shortened(odd)}")

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().resolve_neg()

    def keys(self) -> list[str]:
        return list(self._tensors)
