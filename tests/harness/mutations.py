# SPDX-License-Identifier: Apache-2.0
"""Damage a safetensors checkpoint in one of many ways, the same for the same seed.

    folder = mutate(checkpoint, seed=17, into=folder)

A mutation works on the files' contents in memory. Some keep the file well-formed and change what it says (names,
dtypes, shapes, values), some break its form (headers, offsets, lengths), some change which files there are.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.safetensors_format import DTYPES, INDEX

Files = dict[str, bytes]
Header = dict[str, Any]


def altered(checkpoint: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a single-file checkpoint with `change` made to its tensors, by name."""
    from safetensors.torch import load_file, save_file

    into.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (into / file.name).write_bytes(file.read_bytes())
    (weights,) = checkpoint.glob("*.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, into / weights.name, {"format": "pt"})
    return into


def without_shared_keys_and_values(checkpoints: Path, into: Path) -> Path:
    """A Gemma 4 whose last layer takes keys and values from the first; published checkpoints have none for it."""
    from workbench.quality import families

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("k_proj", "v_proj", "k_norm"):
            del tensors[f"model.layers.1.self_attn.{name}.weight"]

    path = altered(families.build("Gemma4ForCausalLM", checkpoints), into, drop)
    config = json.loads((path / "config.json").read_text())
    config |= {"num_kv_shared_layers": 1, "layer_types": ["full_attention", "full_attention"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def pickled(checkpoint: Path, into: Path, change: Callable[[dict[str, Any]], Any], suffix: str = "bin") -> Path:
    """A copy of a single-file checkpoint as `torch.save` writes it, with `change` made to its entries.

    Args:
        change: alters them in place, or returns what is saved in their place.
        suffix: of the file.
    """
    from safetensors.torch import load_file

    shutil.copytree(checkpoint, into, ignore=shutil.ignore_patterns("*.safetensors"))
    (weights,) = checkpoint.glob("*.safetensors")
    entries: dict[str, Any] = dict(load_file(weights))
    torch.save(change(entries) or entries, into / f"pytorch_model.{suffix}")
    return into


def mutate(checkpoint: Path, seed: int, into: Path) -> str:
    """Write a damaged copy of `checkpoint` and return what was done to it, in words.

    Args:
        checkpoint: a folder with safetensors files and an index.
        seed: decides the mutation and all that is random in it.
        into: a folder, emptied first.
    """
    chance = random.Random(seed)
    files = {file.name: file.read_bytes() for file in sorted(checkpoint.iterdir())}
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    detail = mutation(files, chance)
    into.mkdir(parents=True, exist_ok=True)
    for old in into.iterdir():
        old.unlink()
    for name, content in files.items():
        (into / name).write_bytes(content)
    return f"{mutation.__name__.removeprefix('_')}: {detail}"


def each_rival_alone(checkpoint: Path, into: Path) -> Iterator[Path]:
    """Copies of a well-formed checkpoint without duplicates: of a tensor in several files, one of them is kept.

    One copy for each file with such tensors, where that file's are kept. Tensors of more than two files, and pairs of
    files that share some, are mixed as the files' order has it.
    """
    files = {file.name: file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors"))}
    owners: dict[str, list[str]] = {}
    for file, content in files.items():
        for tensor in _parse(content)[0].keys() - {"__metadata__"}:
            owners.setdefault(tensor, []).append(file)
    for kept in sorted({file for owning in owners.values() if len(owning) > 1 for file in owning}):
        winners = {tensor: kept if kept in owning else owning[0] for tensor, owning in owners.items()}
        copy = into / kept
        shutil.copytree(checkpoint, copy)
        for file, content in files.items():
            losers = {tensor for tensor, winner in winners.items() if winner != file}
            (copy / file).write_bytes(_rebuilt(content, partial(_without, names=losers)))
        yield copy


def _without(tensors: dict[str, Any], names: Set[str]) -> None:
    for name in tensors.keys() & names:
        del tensors[name]


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing safetensors files as they are, with whatever nonsense in them
# ---------------------------------------------------------------------------------------------------------------------


def _weights(files: Files, chance: random.Random) -> str:
    return chance.choice([name for name in files if name.endswith(".safetensors")])


def _parse(content: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _packed(header: Header, data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data


def _tensor(header: Header, chance: random.Random) -> str:
    """A tensor's name; the quantized layers' twice as likely as their number."""
    names = [name for name in header if name != "__metadata__"]
    return chance.choice(names + [name for name in names if "_proj" in name])


def _rebuilt(content: bytes, change: Callable[[dict[str, tuple[str, list[int], bytes]]], None]) -> bytes:
    """`content` with its tensors, as (dtype, shape, bytes), changed and laid out anew: a well-formed file."""
    header, data = _parse(content)
    metadata = header.pop("__metadata__", None)
    tensors = {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }
    change(tensors)
    fresh: Header = {} if metadata is None else {"__metadata__": metadata}
    parts, end = [], 0
    for name, (dtype, shape, values) in tensors.items():
        start, end = end, end + len(values)
        fresh[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        parts.append(values)
    return _packed(fresh, b"".join(parts))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    plain: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return plain


def _as_tensor(dtype: str, shape: list[int], values: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(values), dtype=DTYPES[dtype]).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Mutations: change `files`, say what was done
# ---------------------------------------------------------------------------------------------------------------------


def _nothing(_files: Files, _chance: random.Random) -> str:
    return "as it was"


def _cut_off(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    kept = chance.choice([0, 1, 7, 8, 9, chance.randrange(len(files[name])), len(files[name]) - 1])
    files[name] = files[name][:kept]
    return f"{name} after {kept} bytes"


def _lengthened(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    extra = chance.choice([1, 8, 4096])
    files[name] += chance.randbytes(extra)
    return f"{name} by {extra} bytes"


def _header_length_changed(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    length = chance.choice([0, 1, 2, chance.randrange(1 << 12), 100_000_001, (1 << 63) - 1, (1 << 64) - 1])
    files[name] = struct.pack("<Q", length) + files[name][8:]
    return f"{name} claims {length} bytes of header"


def _header_bytes_changed(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    content = bytearray(files[name])
    (length,) = struct.unpack("<Q", content[:8])
    places = [8 + chance.randrange(length) for _ in range(chance.choice([1, 1, 2, 20]))]
    for place in places:
        content[place] = chance.randrange(256)
    files[name] = bytes(content)
    return f"{name} at {places}"


def _header_digit_changed(files: Files, chance: random.Random) -> str:
    """Stays JSON: shapes, offsets and layer numbers that do not fit."""
    name = _weights(files, chance)
    content = bytearray(files[name])
    (length,) = struct.unpack("<Q", content[:8])
    digits = [place for place in range(8, 8 + length) if chr(content[place]).isdigit()]
    place = chance.choice(digits)
    content[place] = ord(chance.choice("0123456789"))
    files[name] = bytes(content)
    return f"{name} at {place}"


def _entry_changed(files: Files, chance: random.Random) -> str:
    """One entry of the header says something else; the data stays."""
    name = _weights(files, chance)
    header, data = _parse(files[name])
    tensor = _tensor(header, chance)
    entry = header[tensor]
    start, stop = entry["data_offsets"]
    field, value = chance.choice(
        [
            ("dtype", chance.choice(sorted(DTYPES))),
            ("dtype", chance.choice(["F16", "I16", "U16"])),  # As many bytes: the file stays well-formed.
            ("dtype", chance.choice(["BF17", "", None, 16])),
            ("shape", entry["shape"][::-1]),
            ("shape", [*entry["shape"], 1]),
            ("shape", [chance.randrange(1 << 40), *entry["shape"][1:]]),
            ("shape", [-1, *entry["shape"][1:]]),
            ("shape", []),
            ("shape", None),
            ("data_offsets", [stop, start]),
            ("data_offsets", [start + 2, stop + 2]),
            ("data_offsets", [0, stop - start]),
            ("data_offsets", [start, 1 << 62]),
            ("data_offsets", [start]),
        ]
    )
    entry[field] = value
    files[name] = _packed(header, data)
    return f"{tensor}: {field} {value}"


def _renamed(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    names: list[str] = []

    def change(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        old = _tensor(tensors, chance)
        new = chance.choice(
            [
                "",
                old[:-1],
                old.upper(),
                f"{old}.weight",
                f"model.{old}",
                old.replace("layers.1", "layers.9").replace("layers.0", "layers.10"),
                old.replace("experts.1", "experts.99"),
                old.replace("experts.1.", "experts.-1."),
                old.replace("up_proj", "gate_proj"),
                old.replace("weight", "weight_scale"),
                old.replace(".", "/"),
                "\N{SNOWMAN}{0}%s\n",
                "x" * 5000,
            ]
        )
        tensors[new] = tensors.pop(old)
        names.extend([old, new[:80]])

    files[name] = _rebuilt(files[name], change)
    return " to ".join(map(repr, names))


def _dropped(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    dropped: list[str] = []

    def change(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        for _ in range(chance.choice([1, 1, 1, 3, len(tensors) - 1])):
            dropped.append(_tensor(tensors, chance))
            del tensors[dropped[-1]]

    files[name] = _rebuilt(files[name], change)
    return ", ".join(dropped[:3])


def _twice(files: Files, chance: random.Random) -> str:
    """A tensor in a second file too, with the same or other values."""
    first, second = chance.sample([name for name in files if name.endswith(".safetensors")], 2)
    header, _ = _parse(files[first])
    tensor = _tensor(header, chance)
    same = chance.random() < 0.3
    entry: list[tuple[str, list[int], bytes]] = []
    files[first] = _rebuilt(files[first], lambda tensors: entry.append(tensors[tensor]))
    dtype, shape, values = entry[0]
    copy = values if same else _bytes_of(_as_tensor(dtype, shape, values) * 3)
    files[second] = _rebuilt(files[second], lambda tensors: tensors.update({tensor: (dtype, shape, copy)}))
    return f"{tensor} with {'the same' if same else 'other'} values"


def _recast(files: Files, chance: random.Random) -> str:
    """A tensor, or a whole file, in another dtype; the file is well-formed and says so."""
    name = _weights(files, chance)
    dtype = chance.choice(sorted(DTYPES))
    whole = chance.random() < 0.4
    recast: list[str] = []

    def change(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        for tensor in list(tensors) if whole else [_tensor(tensors, chance)]:
            was, shape, values = tensors[tensor]
            tensors[tensor] = (dtype, shape, _bytes_of(_as_tensor(was, shape, values).to(DTYPES[dtype])))
            recast.append(tensor)

    files[name] = _rebuilt(files[name], change)
    return f"{'all tensors' if whole else recast[0]} to {dtype}"


def _reshaped(files: Files, chance: random.Random) -> str:
    """A tensor of another shape; the file is well-formed and says so."""
    name = _weights(files, chance)
    told: list[str] = []

    def change(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        tensor = _tensor(tensors, chance)
        dtype, shape, values = tensors[tensor]
        old = _as_tensor(dtype, shape, values)
        new = chance.choice(
            [
                old[:-1],
                old[..., :-1],
                old[:0],
                old[:1],
                torch.cat([old, old]),
                torch.cat([old, old[:1]]),
                old.t() if old.dim() == 2 else old,
                old.reshape(-1),
                old.unsqueeze(0),
                old.reshape(-1)[0],
                old.reshape(shape[0] // 2, -1),
            ]
        )
        tensors[tensor] = (dtype, list(new.shape), _bytes_of(new))
        told.append(f"{tensor} from {shape} to {list(new.shape)}")

    files[name] = _rebuilt(files[name], change)
    return told[0]


def _values_changed(files: Files, chance: random.Random) -> str:
    """Random bytes (NaN among them), zeros, NaN, Inf or very large numbers where values were."""
    name = _weights(files, chance)
    told: list[str] = []

    def change(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        tensor = _tensor(tensors, chance)
        dtype, shape, values = tensors[tensor]
        kind = chance.choice(["random", "zero", "nan", "inf", "-inf", "huge", "tiny", "one nan", "one inf"])
        if kind == "random":
            changed = chance.randbytes(len(values))
        else:
            new = _as_tensor(dtype, shape, values)
            target = new.view(-1)[chance.randrange(new.numel()) :][:1] if kind.startswith("one") else new
            numbers = {"zero": 0.0, "huge": 3e38, "tiny": 1e-40}
            target.fill_(numbers[kind] if kind in numbers else float(kind.removeprefix("one ")))
            changed = _bytes_of(new)
        tensors[tensor] = (dtype, shape, changed)
        told.append(f"{tensor} to {kind}")

    files[name] = _rebuilt(files[name], change)
    return told[0]


def _metadata_changed(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    header, data = _parse(files[name])
    metadata: Any = chance.choice([None, {}, {"format": "np"}, {"format": 1}, [], "pt"])
    header["__metadata__"] = metadata
    if metadata is None and chance.random() < 0.5:
        del header["__metadata__"]
    files[name] = _packed(header, data)
    return f"{name}: {metadata}"


def _file_gone(files: Files, chance: random.Random) -> str:
    name = chance.choice([_weights(files, chance), _weights(files, chance), INDEX])
    del files[name]
    return name


def _files_swapped(files: Files, chance: random.Random) -> str:
    first, second = chance.sample([name for name in files if name.endswith(".safetensors")], 2)
    files[first], files[second] = files[second], files[first]
    return f"{first} and {second}"


def _index_changed(files: Files, chance: random.Random) -> str:
    index = json.loads(files[INDEX])
    mapping = index["weight_map"]
    tensor = _tensor(mapping, chance)
    kind = chance.choice(["other file", "unknown file", "absent", "added", "broken", "empty", "no map", "absolute"])
    if kind == "other file":
        mapping[tensor] = chance.choice([name for name in files if name.endswith(".safetensors")])
    elif kind in ("unknown file", "absolute"):
        mapping[tensor] = "/nowhere.safetensors" if kind == "absolute" else "model-00099.safetensors"
    elif kind == "absent":
        del mapping[tensor]
    elif kind == "added":
        mapping["model.layers.77.self_attn.q_proj.weight"] = mapping[tensor]
    elif kind == "no map":
        del index["weight_map"]
    files[INDEX] = {"broken": b"{", "empty": b""}.get(kind, json.dumps(index).encode())
    return f"{kind} ({tensor})"


def _not_a_checkpoint(files: Files, chance: random.Random) -> str:
    name = _weights(files, chance)
    content = chance.choice(
        [b"<html>404</html>" * 20, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", bytes(4096)]
    )
    files[name] = content
    return f"{name} is {content[:24]!r}"


MUTATIONS: tuple[Callable[[Files, random.Random], str], ...] = (
    _nothing,
    _cut_off,
    _lengthened,
    _header_length_changed,
    _header_bytes_changed,
    _header_digit_changed,
    _entry_changed,
    _renamed,
    _dropped,
    _twice,
    _recast,
    _reshaped,
    _values_changed,
    _metadata_changed,
    _file_gone,
    _files_swapped,
    _index_changed,
    _not_a_checkpoint,
)
