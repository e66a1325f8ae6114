# SPDX-License-Identifier: Apache-2.0
"""What a dump of ``--load-format presharded`` was made of, kept beside it.

SGLang names a dump's folder by the parallelism, and by a signature of the model's shapes. Neither the checkpoint nor
the scheme is among that, so SGLang would serve a dump in place of weights that it was not made of.

    scheme, SGLang release, device, kernels    become part of the signature: another dump is written beside it
    checkpoint                                 is compared where its files are there: another one is an error
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.errors import DumpError
from sglang_overlay.load.checkpoint_files import fingerprint
from sglang_overlay.load.summary import role_of
from sglang_overlay.schemes import capabilities
from sglang_overlay.settings import Settings

SCHEMA = "sglang-streamfp8/presharded"
VERSION = 1
RECORD = "streamfp8.json"
READY = "READY"
"""SGLang's own mark of a complete dump."""
_STRUCTURE = "structural_signature"
"""A part of SGLang's configuration of a dump that differs wherever any other does."""

Made = Mapping[str, Any]
"""What a dump is made of, by what each part is called in messages."""


def made_of(settings: Settings, release: str | None) -> Made:
    """What a dump of this start depends on beside SGLang's own configuration of it."""
    choice = settings.schemes
    return {
        "scheme": choice.as_json if choice.overrides else choice.text,
        "SGLang": release,
        "device": capabilities.device_kind(),
        **capabilities.kernels(),
    }


def signature(structure: str | None, made: Made) -> str:
    """SGLang's signature of the model's structure, and of what a dump is made of."""
    return hashlib.sha256(json.dumps([structure, made]).encode()).hexdigest()[:16]


def write(folder: Path, model_config: Any, made: Made, files: Sequence[Path]) -> None:
    """Keep what a dump in ``folder`` is made of.

    Args:
        folder: where SGLang is about to write the dump.
        model_config: upstream's.
        made: ``made_of`` and SGLang's own configuration.
        files: of the checkpoint.
    """
    record = {
        "schema": SCHEMA,
        "version": VERSION,
        "model": _model(model_config),
        "made": made,
        "checkpoint": {file.name: fingerprint(file) for file in files},
    }
    hidden = folder / f".{RECORD}"
    hidden.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    hidden.replace(folder / RECORD)


def keep_orders(folder: Path, rank: str, extras: Mapping[str, torch.Tensor]) -> None:
    """Keep how tensors lie in memory that are no parameters: SGLang writes them row by row and reads them so.

    MLA's ``w_kc`` and ``w_vc`` are transposed, since their kernels want columns.
    """
    orders = {name: _order(tensor) for name, tensor in extras.items() if not tensor.is_contiguous()}
    (folder / _orders(rank)).write_text(json.dumps(orders), encoding="utf-8")


def restore_orders(folder: Path, rank: str, model: torch.nn.Module) -> None:
    """Lay tensors out as they were when ``keep_orders`` saw them."""
    file = folder / _orders(rank)
    orders: dict[str, list[int]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, order in orders.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, attribute)
        back = [order.index(dimension) for dimension in range(tensor.dim())]
        setattr(module, attribute, tensor.permute(order).contiguous().permute(back))


def _orders(rank: str) -> str:
    return f"streamfp8-{rank}.json"


def _order(tensor: torch.Tensor) -> list[int]:
    """Dimensions, the one with the longest stride first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def check(folder: Path, made: Made, files: Sequence[Path]) -> None:
    """Make sure that a dump was made of what is being started.

    Args:
        folder: of the dump. One without a record, of a model that is not quantized while it is loaded, passes.
        made: as ``made_of`` says.
        files: of the checkpoint. Where there are none, as on machines that have only the dump, it is not compared.

    Raises:
        DumpError: it was made of something else.
    """
    record = _read(folder)
    if record is None:
        return
    wrong = list(_differences(record["made"], made))
    known = record["checkpoint"]
    there = {file.name: file for file in files}
    if there:
        changed = [name for name in known if name not in there or fingerprint(there[name]) != known[name]]
        wrong += [f"another checkpoint ({changed[0]} is not the file it was made of)"] if changed else []
    if wrong:
        raise DumpError(
            f"{folder} was made of {'; '.join(wrong)}. Remove it to have it written again, or give another "
            '"presharded_path" in --model-loader-extra-config.'
        )


def others(folder: Path, model_config: Any, made: Made) -> list[str]:
    """The complete dumps beside ``folder`` of the same model, each with what it was made of and ``made`` is not."""
    found = []
    for mark in sorted(folder.parent.glob(f"*/{READY}")):
        record = _read(mark.parent)
        if record is not None and record["model"] == _model(model_config):
            wrong = "; ".join(_differences(record["made"], made)) or "another structure"
            found.append(f"{mark.parent.name} was made of {wrong}")
    return found


def _differences(was: Made, made: Made) -> Iterator[str]:
    now = json.loads(json.dumps(made))
    compared = now.keys() & was.keys() - {_STRUCTURE}
    return (f"{name} {was[name]}, not {now[name]}" for name in sorted(compared) if was[name] != now[name])


def _model(model_config: Any) -> str:
    """Tells a target's dumps from its draft's, which may lie in the same folder."""
    return f"{', '.join(model_config.hf_config.architectures)}, {role_of(model_config)}"


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record if record["version"] == VERSION else None
