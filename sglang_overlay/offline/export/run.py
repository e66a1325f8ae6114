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
"""Free bytes required beyond what is written."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        tensors: number of tensors in the checkpoint.
        quantized: how many of them are stored as values and scales.
        source_bytes: bytes of the checkpoint's tensors.
        stored_bytes: bytes of the export's tensors.
        shards: number of files with weights.
        resumed: how many of these an earlier, interrupted run had written.
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
"""A file with facts about the export, in the exported checkpoint's folder."""


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

    1. Trace SGLang's own loader: which tensors an online load would quantize, and where they go in the model.
    2. Assign each tensor to a shard.
    3. Write one shard after another, then copied files, the index, and finally ``config.json``.

    An interrupted export continues where it stopped when it is started again.

    Args:
        source: folder of a bf16 checkpoint.
        target: folder that does not exist, is empty, or holds an interrupted run of the same export.
        schemes: one scheme for all quantized layers; layers may be left out.
        most: most bytes in a shard.
        server_args: further fields of SGLang's ``ServerArgs``.
        progress: creates the progress display, given the bytes to be written.
        free: returns the free disk space, in bytes, for a folder.

    Raises:
        StreamFP8Error: the checkpoint cannot be exported, or not to ``target``.
        OSError: reading or writing failed. The next start reuses what has been written.
    """
    from sglang_overlay.offline.tracing import trace

    # Checked first, since schemes and tracing import SGLang.
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
        # Before the folder was locked, another process may have continued the export.
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
    """The stored format for a choice of schemes.

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
    """Facts about the export, for anyone who finds the checkpoint."""
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
    """Bytes of free disk space that are needed."""
    return sum(map(shard_bytes, missing)) + sum(path.stat().st_size for path in checkpoint.others()) + _SPARE


def _described(checkpoint: SourceCheckpoint, plan: ExportPlan) -> dict[str, Any]:
    """What an interrupted export and the one that continues it must have in common."""
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
    """Write what turns the shards into a checkpoint, ``config.json`` last."""
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
