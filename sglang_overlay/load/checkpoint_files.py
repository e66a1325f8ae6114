# SPDX-License-Identifier: Apache-2.0
"""Find problems of a checkpoint's files by their names and headers, and by values of single tensors if asked to.

SGLang loads the files that exist, whatever the index says, and errors of safetensors and torch do not name the file.
SGLang chooses which files it reads (a name on the hub, ``.bin`` beside ``.safetensors``, two sets of the same weights),
so a hook notes them where it makes that choice.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sglang_overlay.core.messages import annotate
from sglang_overlay.core.shortage import is_shortage

_INDEX = "*.index.json"
_LENGTH = 8
"""Bytes of the length field in front of a safetensors header."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_ZIP = b"PK"
"""First bytes of a file of ``torch.save``; before PyTorch 1.6 it was a pickle."""


class CheckpointFiles:
    """The files of one or more checkpoints that SGLang has chosen to read.

    Attributes:
        read: in SGLang's order. Empty for loaders that find files themselves, like the Run:ai streamer's.
    """

    def __init__(self) -> None:
        self.read: list[Path] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the files that SGLang chooses inside the block, in this thread."""
        token = _noted.set(self)
        try:
            yield
        finally:
            _noted.reset(token)

    def in_folder(self, model_path: str) -> list[Path]:
        """The noted files or, if there are none, those of a local folder."""
        return self.read or [*Path(model_path).glob("*.safetensors"), *Path(model_path).glob("*.bin")]

    @contextmanager
    def problems_added(self, model_path: str) -> Iterator[None]:
        """Context that adds problems of the files to an error of its block."""
        try:
            yield
        except Exception as error:
            # Reading the files would need memory as well.
            for problem in [] if is_shortage(error) else file_problems(self.in_folder(model_path)):
                annotate(error, f"StreamFP8: {problem}")
            raise


_noted: ContextVar[CheckpointFiles | None] = ContextVar("streamfp8_files", default=None)


def prepare_weights(original: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``DefaultModelLoader._prepare_weights``, which finds or downloads a checkpoint's files."""
    folder, files, use_safetensors = original(loader, *args, **kwargs)
    noted = _noted.get()
    if noted is not None:
        noted.read += [Path(file) for file in files]
    return folder, files, use_safetensors


def noted_problems() -> list[str]:
    """``file_problems`` of the files noted so far in the current ``noted`` block."""
    noted = _noted.get()
    return [] if noted is None else file_problems(noted.read)


def file_problems(files: Collection[Path]) -> list[str]:
    """Missing, empty, truncated and unreadable files of local checkpoints, with their folders.

    Args:
        files: those that are read. Other files in their folders matter only if an index names them together with these.
    """
    return [*_missing(files), *_damaged(files)]


def fingerprint(file: Path) -> str:
    """Tells files apart by their size and by samples spread over them, without reading all of them."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def local_files(model_config: Any, load_config: Any) -> list[Path]:
    """The weight files of a model that are on this machine, in a folder or in the cache of the hub."""
    folder = Path(model_config.model_path)
    if not folder.is_dir():
        cached = in_hub_cache(
            model_config.model_path, revision=model_config.revision, cache_dir=load_config.download_dir
        )
        if cached is None:
            return []
        folder = cached
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")]


def in_hub_cache(name: str, **where: Any) -> Path | None:
    """The folder of this model in the local cache of the hub, if it is there; nothing is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True, **where))
    except (OSError, ValueError):
        return None


def values_not_finite(files: Collection[Path], names: Collection[str]) -> dict[str, tuple[int, int]]:
    """(NaN or Inf values, all values) of each of these tensors, by name; only tensors in safetensors files."""
    found: dict[str, tuple[int, int]] = {}
    for file in sorted(file for file in files if file.suffix == ".safetensors") if names else ():
        with safe_open(file, framework="pt") as tensors:
            for name in set(names).intersection(tensors.keys()):
                values = tensors.get_tensor(name)
                found[name] = (int((~values.isfinite()).sum()), values.numel())
    return found


def _missing(files: Collection[Path]) -> Iterator[str]:
    for index in sorted(index for folder in {file.parent for file in files} for index in folder.glob(_INDEX)):
        try:
            named = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{index} is no index of weights ({type(error).__name__}: {error})"
            continue
        # Another set of the same weights in this folder may have its own index.
        absent = [] if named.isdisjoint(file.name for file in files) else sorted(named)
        yield from (
            f"{index} names {name}, which is not there" for name in absent if not (index.parent / name).exists()
        )


def _damaged(files: Collection[Path]) -> Iterator[str]:
    for file in sorted(files):
        try:
            problem = _header_problem(file) if file.suffix == ".safetensors" else _pickle_problem(file)
        except OSError as error:
            problem = f"cannot be read ({error})"
        if problem is not None:
            yield f"{file} {problem}"


def _pickle_problem(file: Path) -> str | None:
    if not file.stat().st_size:
        return "is empty"
    with file.open("rb") as opened:
        is_zip = opened.read(len(_ZIP)) == _ZIP
    if is_zip and not zipfile.is_zipfile(file):
        return "is cut off"
    try:
        torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:
        return f"cannot be read: {str(error).partition(chr(10))[0]}"
    return None


def _header_problem(file: Path) -> str | None:
    size = file.stat().st_size
    if size < _LENGTH:
        return f"is empty or cut off: it has {size} bytes"
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(_LENGTH))
    if length > size - _LENGTH:
        return f"is cut off or no safetensors file: its header should have {length} bytes, the file has {size}"
    try:
        with safe_open(file, framework="pt"):
            return None
    except Exception as error:
        return f"is damaged, or its download is incomplete: {error}"
