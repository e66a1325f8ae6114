# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint: trace, plan, write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sglang_overlay import __version__
from sglang_overlay.errors import ExportError
from sglang_overlay.observe.formats import bytes_text
from sglang_overlay.observe.progress import Progress, SilentProgress
from sglang_overlay.offline.export import journal
from sglang_overlay.offline.export.plan import ExportPlan, Shard, make_plan
from sglang_overlay.offline.export.source import CONFIG, SourceCheckpoint
from sglang_overlay.offline.export.weight_file import appearing
from sglang_overlay.offline.export.writing import shard_bytes, write_shard
from sglang_overlay.safetensors_format import INDEX
from sglang_overlay.schemes import registry
from sglang_overlay.schemes.choice import NONE, SchemeChoice
from sglang_overlay.schemes.stored_format import StoredFormat

DEFAULT_SHARD_BYTES = 5 * 10**9
_SPARE = 64 << 20
"""Bytes that are to be free beyond what is written."""


@dataclass(frozen=True)
class Exported:
    """What an export has made.

    Attributes:
        tensors: of the checkpoint.
        quantized: how many of them are stored as values and scales.
        source_bytes: of the checkpoint's tensors.
        stored_bytes: of the export's.
        shards: files with weights.
        resumed: how many of these an earlier, interrupted export had written.
    """

    tensors: int
    quantized: int
    source_bytes: int
    stored_bytes: int
    shards: int
    resumed: int


def free_bytes(folder: Path) -> int:
    """Free disk space where ``folder`` is, or would be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


RECORD = "streamfp8_export.json"
"""Lies beside an exported checkpoint."""


def export(
    source: Path,
    target: Path,
    schemes: SchemeChoice,
    most: int = DEFAULT_SHARD_BYTES,
    server_args: Mapping[str, Any] = MappingProxyType({}),
    progress: Callable[[int], Progress] = lambda _total: SilentProgress(),
    free: Callable[[Path], int] = free_bytes,
) -> Exported:
    """Write ``source``, quantized, to ``target``.

    1. SGLang's own loader says which tensors an online load would quantize, and where they go in the model.
    2. Each is given its place in a shard.
    3. Shards are written one after another, then the files that are copied, the index, and ``config.json`` at the end.

    An export that was interrupted goes on where it stopped when it is started again.

    Args:
        source: folder of a bf16 checkpoint.
        target: folder that does not exist, is empty, or holds an interrupted export of the same.
        schemes: one scheme for all that is quantized; layers may be left out.
        most: bytes in a shard.
        server_args: further fields of SGLang's ``ServerArgs``.
        progress: given the bytes to be written, makes what shows them.
        free: free disk space for a folder.

    Raises:
        StreamFP8Error: it cannot be exported, or not to there.
        OSError: reading or writing failed. What has been written by then is used again by the next start.
    """
    from sglang_overlay.offline.tracing import trace

    # First of all: schemes and tracing import SGLang.
    journal.check_free(target)
    form = form_of(schemes)
    checkpoint = SourceCheckpoint(source)
    tensors = checkpoint.tensors()
    plan = make_plan(tensors, checkpoint.config, trace(source, schemes, server_args), form, most)
    described = _described(checkpoint, plan)
    journal.check_free_for(target, described)
    needed = _bytes_to_write(checkpoint, _missing(plan, target))
    if free(target) < needed:
        raise ExportError(
            f"{target} needs {bytes_text(needed)} of free disk, and there are {bytes_text(free(target))}. "
            "Nothing has been written."
        )
    with journal.begun(target, described), checkpoint.opened() as files:
        # Until the folder was held, another export may have gone on with it.
        missing = _missing(plan, target)
        with closing(progress(sum(item.nbytes for shard in missing for item in shard.items))) as bar:
            for shard in missing:
                write_shard(shard, form, files, target / shard.name, bar.advance)
        _finish(checkpoint, plan, _record(schemes, form), target)
    return Exported(
        tensors=len(tensors),
        quantized=sum(item.is_quantized for item in plan.items),
        source_bytes=sum(tensor.nbytes for tensor in tensors),
        stored_bytes=plan.nbytes,
        shards=len(plan.shards),
        resumed=len(plan.shards) - len(missing),
    )


def form_of(schemes: SchemeChoice) -> StoredFormat:
    """How the weights of a choice of schemes are stored.

    Raises:
        ExportError: they cannot be stored in one checkpoint that stock SGLang loads.
        SchemeError: there is no such scheme.
    """
    registry.check(schemes)
    names = sorted(schemes.names - {NONE})
    if len(names) != 1:
        raise ExportError(f"a checkpoint has one quantization method, and {', '.join(names) or NONE} were asked for")
    form = None if names[0] not in registry.entry_points() else registry.find(names[0]).stored()
    if form is None:
        storable = [name for name in registry.entry_points() if registry.find(name).stored() is not None]
        raise ExportError(
            f"there is no checkpoint of the scheme {names[0]!r} that stock SGLang would load with the same weights. "
            f"Use one of: {', '.join(storable)}."
        )
    return form


def _record(schemes: SchemeChoice, form: StoredFormat) -> dict[str, Any]:
    """What whoever finds the checkpoint may want to know of it."""
    return {
        "schema": "sglang-streamfp8/export-record",
        "version": 1,
        "overlay": __version__,
        "scheme": schemes.text,
        "same_as_online_loads": form.same_as,
    }


def _missing(plan: ExportPlan, target: Path) -> list[Shard]:
    return [shard for shard in plan.shards if not (target / shard.name).exists()]


def _bytes_to_write(checkpoint: SourceCheckpoint, missing: Sequence[Shard]) -> int:
    """Free disk that is needed."""
    return sum(map(shard_bytes, missing)) + sum(path.stat().st_size for path in checkpoint.others()) + _SPARE


def _described(checkpoint: SourceCheckpoint, plan: ExportPlan) -> dict[str, Any]:
    """What an interrupted export must have in common with the one that goes on with it."""
    return {
        "schema": "sglang-streamfp8/export-journal",
        "version": 1,
        "overlay": __version__,
        "source": [list(entry) for entry in checkpoint.identity()],
        "quantization_config": plan.config["quantization_config"],
        "dtypes": sorted({str(item.dtype) for item in plan.items if item.is_quantized}),
        "shards": {shard.name: [entry.name for entry in shard.entries] for shard in plan.shards},
    }


def _finish(checkpoint: SourceCheckpoint, plan: ExportPlan, record: Mapping[str, Any], target: Path) -> None:
    """What makes shards a checkpoint; ``config.json`` last."""
    for path in checkpoint.others():
        with path.open("rb") as original, appearing(target / path.name) as copy:
            shutil.copyfileobj(original, copy)
    if len(plan.shards) > 1:
        places = {entry.name: shard.name for shard in plan.shards for entry in shard.entries}
        _write_json(
            target / INDEX, {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(places.items()))}
        )
    _write_json(target / RECORD, record)
    _write_json(target / CONFIG, plan.config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with appearing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
