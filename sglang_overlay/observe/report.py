# SPDX-License-Identifier: Apache-2.0
"""The load report: what one load on one rank did and cost, as JSON that other programs can rely on.

``load_report.schema.json`` beside this module specifies the format (JSON Schema 2020-12). Within one version, fields
are only ever added; readers ignore those they do not know. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import json
import os
import re
import threading
import types
import typing
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.observe.formats import bytes_text, count_text, seconds_text
from sglang_overlay.observe.memory import MemoryUsage

SCHEMA = "sglang-streamfp8/load-report"
VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("load_report.schema.json")
_PATTERN = "load-*.json"
# Fields that the first reports of this version did not have; a reader uses the default if one is missing.
_ADDED = types.MappingProxyType({"added": True})

Mode = Literal["stock", "streaming"]
Role = Literal["target", "draft"]
Record = TypeVar("Record")


class ReportError(StreamFP8Error):
    """A report could not be written or read."""


@dataclass(frozen=True)
class ParallelRank:
    """Place of this process in one kind of parallelism."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Ranks:
    """Tensor, pipeline and expert parallelism."""

    tp: ParallelRank = field(default_factory=ParallelRank)
    pp: ParallelRank = field(default_factory=ParallelRank)
    ep: ParallelRank = field(default_factory=ParallelRank)

    @property
    def is_first(self) -> bool:
        """Whether this rank should log messages that would be the same on all ranks."""
        return self.tp.rank == self.pp.rank == 0

    @property
    def name(self) -> str:
        """For files that each rank has of its own: no two ranks of a model have the same."""
        return f"pp{self.pp.rank}-tp{self.tp.rank}"


@dataclass(frozen=True)
class UnitCounts:
    """Quantization units of this rank.

    Attributes:
        streamed: quantized while the checkpoint was being read.
        direct: how many of those came whole from one checkpoint tensor and so needed no staging memory.
    """

    streamed: int = 0
    direct: int = 0


@dataclass(frozen=True)
class StagingUsage:
    """High-precision memory held for units whose tensors had not all arrived."""

    peak_bytes: int = 0


@dataclass(frozen=True)
class LayerNote:
    """A layer that was not streamed, by its name in the model, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class LayerFigures:
    """Figures of one streamed layer on this rank.

    Attributes:
        layer: its name in the model.
        units: number of quantization units.
        direct: how many of those needed no staging memory.
        bytes: of its quantized weights and their scales.
        first_seconds: from the beginning of the load until its first unit was quantized.
        last_seconds: the same for its last unit; both are 0 if the weights read were quantized already.
    """

    layer: str
    units: int
    direct: int
    bytes: int
    first_seconds: float = 0.0
    last_seconds: float = 0.0


@dataclass(frozen=True)
class LayerCounts:
    """Layers of this rank that fp8 quantization applies to.

    Attributes:
        streamed: number of layers that were quantized unit by unit.
        deferred: layers kept in high precision until upstream was done with them, then quantized (MLA's kv_b_proj).
        fallback: layers loaded as in stock SGLang.
        figures: figures of each streamed layer, in the order they were finished.
    """

    streamed: int = 0
    deferred: tuple[LayerNote, ...] = ()
    fallback: tuple[LayerNote, ...] = ()
    figures: tuple[LayerFigures, ...] = field(default=(), metadata=_ADDED)


@dataclass(frozen=True)
class LoadReport:
    """One load on one rank.

    Attributes:
        release: SGLang's version.
        overlay_version: this package's.
        model_path: as SGLang was given it.
        load_format: value of SGLang's ``--load-format``.
        mode: ``streaming``, or ``stock`` if no layer was streamed.
        seconds: wall-clock time of SGLang's ``load_model``: building, reading, quantizing, post-processing.
        memory: of this process, over that time.
        final_bytes: storage of the loaded model's parameters and buffers on this rank.
        role: ``draft`` for the draft model of speculative decoding, else ``target``.
        ranks: of this process.
        units: units quantized while reading.
        staging: high-precision memory held meanwhile.
        layers: layers that fp8 quantization applies to.
        warnings: warnings about this load.
        scheme: how fp8 layers are quantized, as the user chose it.
        missing: parameters that were not completely written from the checkpoint, but are served all the same.
        node: host name of the machine, which in a Kubernetes pod is the pod's name; empty if unknown.
    """

    release: str
    overlay_version: str
    model_path: str
    load_format: str
    mode: Mode
    seconds: float
    memory: MemoryUsage
    final_bytes: int
    role: Role = "target"
    ranks: Ranks = field(default_factory=Ranks)
    units: UnitCounts = field(default_factory=UnitCounts)
    staging: StagingUsage = field(default_factory=StagingUsage)
    layers: LayerCounts = field(default_factory=LayerCounts)
    warnings: tuple[str, ...] = ()
    scheme: str = field(default="stock", metadata=_ADDED)
    missing: tuple[str, ...] = field(default=(), metadata=_ADDED)
    node: str = field(default="", metadata=_ADDED)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all streamed weights and their scales."""
        return sum(layer.bytes for layer in self.layers.figures)


def to_json(report: LoadReport) -> dict[str, Any]:
    """``report`` as plain JSON data, with schema name and version first."""
    return {"schema": SCHEMA, "version": VERSION, **asdict(report)}


def from_json(data: object) -> LoadReport:
    """The report in ``data``.

    Raises:
        ReportError: a field is missing or wrong, or the version is unknown; the message names it.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ReportError(f'not a load report: the top level should be an object with "schema": "{SCHEMA}"')
    if data.get("version") != VERSION:
        raise ReportError(
            f"load report version {data.get('version')!r}, and this sglang-streamfp8 reads version {VERSION}; "
            "read it with the sglang-streamfp8 that wrote it, or a newer one"
        )
    return _record(LoadReport, data, "")


def write(report: LoadReport, folder: Path | str) -> Path:
    """Write ``report`` into ``folder`` (created if missing) and return the new file's path.

    The file appears complete or not at all, and never replaces another: loads of one rank (a restarted server, stock
    and streaming, data-parallel replicas in one folder) get consecutive numbers.

    Raises:
        ReportError: it cannot be written.
    """
    target = Path(folder)
    text = _text(report)
    try:
        target.mkdir(parents=True, exist_ok=True)
        return _write_numbered(text, target, _stem(report))
    except OSError as error:
        raise ReportError(
            f"the load report could not be written to {target}: {error}; point SGLANG_STREAMFP8_REPORT at a folder "
            "this process may write to"
        ) from error


def read(file: Path | str) -> LoadReport:
    """The report in ``file``.

    Raises:
        ReportError: it cannot be read or is invalid; the message names the file and the problem.
    """
    path = Path(file)
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}; delete it or make the report again") from error
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error


def read_folder(folder: Path | str) -> tuple[LoadReport, ...]:
    """All reports of ``folder``, by pipeline, tensor and expert rank, then in the order they were written.

    Raises:
        ReportError: there are none, or one cannot be read.
    """
    source = Path(folder)
    return _in_order(_files(source, source.glob(_PATTERN)))


def read_tree(folder: Path | str) -> dict[Path, tuple[LoadReport, ...]]:
    """The reports of each folder that has some, ``folder`` itself and all below it, as ``read_folder`` returns them.

    Raises:
        ReportError: there are none, or one cannot be read.
    """
    source = Path(folder)
    found: defaultdict[Path, list[Path]] = defaultdict(list)
    for file in _files(source, source.rglob(_PATTERN)):
        found[file.parent].append(file)
    return {place: _in_order(found[place]) for place in sorted(found)}


def _files(folder: Path, found: Iterable[Path]) -> list[Path]:
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; give the one that SGLANG_STREAMFP8_REPORT named for the server")
    files = sorted(found, key=_number)
    if not files:
        raise ReportError(
            f"no load reports ({_PATTERN}) in {folder}; start SGLang with SGLANG_STREAMFP8_REPORT={folder} and load "
            "a model"
        )
    return files


def _in_order(files: Iterable[Path]) -> tuple[LoadReport, ...]:
    return tuple(sorted(map(read, files), key=lambda report: _order(report.ranks)))


def summary_line(report: LoadReport) -> str:
    """One line for the log."""
    cost = (
        f"{seconds_text(report.seconds)}; peak +{bytes_text(report.memory.peak_above_start)} over start; "
        f"model {bytes_text(report.final_bytes)}"
    )
    if report.mode == "stock":
        return f"StreamFP8: nothing streamed, loaded as stock SGLang does; {cost}"
    layers = report.layers
    scheme = "" if report.scheme == "stock" else f"scheme: {report.scheme}; "
    return (
        f"StreamFP8: {scheme}{count_text(report.units.streamed, 'unit')} in {count_text(layers.streamed, 'layer')} "
        f"streamed, {len(layers.deferred)} deferred, {len(layers.fallback)} fell back; {cost}; "
        f"staging peak {bytes_text(report.staging.peak_bytes)}"
    )


def _text(report: LoadReport) -> str:
    text = json.dumps(to_json(report), indent=2, allow_nan=False)
    # One sample per line. JSON strings contain no line breaks, so only lists of two numbers can match.
    text = re.sub(r"\[\n *([-+.e\d]+),\n *(-?\d+)\n *\]", r"[\1, \2]", text)
    # One layer per line; safe for the same reason.
    return _LAYER.sub(lambda found: re.sub(r"\n *", "", re.sub(r",\n *", ", ", found[0])), text) + "\n"


_LAYER = re.compile(r'\{\n *"layer": [^\n]+(?:\n *"[a-z_]+": [^\n]+)+\n *\}')


def _order(ranks: Ranks) -> tuple[int, int, int]:
    return ranks.pp.rank, ranks.tp.rank, ranks.ep.rank


def _stem(report: LoadReport) -> str:
    ranks = report.ranks
    return f"load-tp{ranks.tp.rank}-pp{ranks.pp.rank}-ep{ranks.ep.rank}-{report.role}"


def _number(file: Path) -> tuple[int, str]:
    found = re.search(r"-(\d+)\.json$", file.name)
    return (int(found.group(1)) if found else 0), file.name


def _write_numbered(text: str, folder: Path, stem: str) -> Path:
    draft = folder / f".{stem}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        draft.write_text(text, encoding="utf-8")
        number = 1
        while not _publish(draft, folder / f"{stem}-{number}.json"):
            number += 1
        return folder / f"{stem}-{number}.json"
    finally:
        draft.unlink(missing_ok=True)


def _publish(draft: Path, file: Path) -> bool:
    """Give ``draft`` the name ``file`` in one step; False if that name is taken."""
    try:
        file.hardlink_to(draft)
    except FileExistsError:
        return False
    except OSError:
        # No hard links here (some network and FAT file systems): still all or nothing, but two processes that pick the
        # same number at the same instant could collide.
        if file.exists():
            return False
        draft.replace(file)
    return True


def _record(kind: type[Record], data: object, where: str) -> Record:
    if not isinstance(data, dict):
        raise ReportError(f"{where} should be an object, not {_shown(data)}")
    hints = typing.get_type_hints(kind)
    values = {}
    for item in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{item.name}" if where else item.name
        if item.name in data:
            values[item.name] = _value(hints[item.name], data[item.name], place)
        elif not item.metadata:
            raise ReportError(f"{place} is missing")
    return kind(**values)


def _value(kind: Any, data: object, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return _items(typing.get_args(kind), data, where)
    if origin is Literal:
        return _choice(typing.get_args(kind), data, where)
    if is_dataclass(kind):
        return _record(typing.cast(type, kind), data, where)
    return _scalar(kind, data, where)


def _items(kinds: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ReportError(f"{where} should be a list, not {_shown(data)}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(data)
    if len(kinds) != len(data):
        raise ReportError(f"{where} should have {len(kinds)} items, not {len(data)}")
    pairs = enumerate(zip(kinds, data, strict=True))
    return tuple(_value(kind, item, f"{where}[{index}]") for index, (kind, item) in pairs)


def _choice(choices: tuple[str, ...], data: object, where: str) -> str:
    if data not in choices:
        raise ReportError(f"{where} should be one of {', '.join(choices)}, not {_shown(data)}")
    return str(data)


def _scalar(kind: type, data: object, where: str) -> Any:
    accepted = {float: (int, float), int: (int,), str: (str,)}[kind]
    if not isinstance(data, accepted) or isinstance(data, bool):
        raise ReportError(f"{where} should be {_KINDS[kind]}, not {_shown(data)}")
    return data


_KINDS: types.MappingProxyType[type, str] = types.MappingProxyType(
    {float: "a number", int: "a whole number", str: "a text"}
)


def _shown(data: object) -> str:
    text = json.dumps(data)
    return text if len(text) <= 40 else f"{text[:37]}..."
