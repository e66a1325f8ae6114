"""Tiny checkpoints in the names and layout of published ones, of architectures that ``transformers`` cannot make.

SGLang's own model of a tiny config says what there is: it is built in bf16 with ``--load-format dummy``, and its
parameters are taken apart as the checkpoint has them: fused projections and experts one by one (:data:`SPLITS`), and
renamed by the data of :class:`Published`. The finished checkpoint is then loaded in bf16 by stock, which has to leave
no parameter unwritten.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from workbench.loads.job import LoadJob
from workbench.quality.families import PUBLISHED, SPECIAL, Config, fill, put, tiny_config

if TYPE_CHECKING:
    from workbench.loads.layouts import WeightLayout
    from workbench.loads.loads import LoadWorkers

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name in a checkpoint -> shape and dtype."""

Part = str | tuple[str, int]
"""The name of a part of a fused layer, with its rows where SGLang's layer does not say them."""

SPLITS: Mapping[str, tuple[Part, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": (("q_a_proj", 64), ("kv_a_proj_with_mqa", 80)),
}
"""SGLang's fused layer, a regular expression for the last parts of its name -> the layers that checkpoints commonly
have in its place."""

_EXPERTS = {"w13_weight": "weight", "w2_weight": "weight", "w13_weight_bias": "bias", "w2_weight_bias": "bias"}

_CONFIGURATION = '''from transformers import PretrainedConfig


class Nested(PretrainedConfig):
    """A config whose dicts named ``*_config`` are configs too."""

    model_type = "MODEL_TYPE"

    def __init__(self, **fields):
        for name, value in list(fields.items()):
            if isinstance(value, dict) and name.endswith("_config") and name != "quantization_config":
                fields[name] = Nested(**value)
        super().__init__(**fields)
'''


@dataclass(frozen=True)
class Published:
    """How an architecture's published checkpoint differs from what SGLang's model holds.

    Attributes:
        source: where names and config come from: a URL, or a model on the hub and SGLang's file that reads it.
        config: the config at tiny sizes, or what makes it (:func:`of_transformers`). Without a ``model_type`` that
            SGLang or ``transformers`` knows, it comes with a file of code, as such checkpoints are published, and is
            loaded with ``--trust-remote-code``.
        names: regular expression -> replacement, applied in order to each name; an empty result drops the tensor.
        splits: as :data:`SPLITS`, asked first; an empty tuple keeps the layer fused.
        experts: names of an expert's gate, up and down projection, after ``<layer's experts>.<number>.``; of experts
            without a gate the second and third are used. Empty: ``adjust`` makes them from ``w13_weight`` and the like.
        adjust: the last step: changes the tensors as no name can say.
        files: regular expression -> file; a tensor lies in the first whose expression its name matches.
        lacks: matches parameters that published checkpoints lack: the model makes them itself, or shares its target's.
        beside: the architecture whose checkpoint this draft lies in: its tensors come too.
        named_in_config: the architecture that its ``config.json`` names, if SGLang makes another one of that.
        is_draft: loaded as the draft model of a speculative worker.
        server_args: options that it needs to load.
        gpu: the stand-in GPU on which it is loaded, if SGLang's model needs CUDA; empty: the CPU.
    """

    source: str
    config: Config | Callable[[], Config]
    names: tuple[tuple[str, str], ...] = ()
    splits: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    adjust: Callable[[Tensors], Tensors] | None = None
    files: Mapping[str, str] = field(default_factory=lambda: {"": "model.safetensors"})
    lacks: str = ""
    beside: str = ""
    named_in_config: str = ""
    is_draft: bool = False
    server_args: Mapping[str, Any] = field(default_factory=dict)
    gpu: str = ""

    def job(self, path: Path) -> LoadJob:
        """A load of the checkpoint at `path`."""
        arguments = {
            **({"trust_remote_code": True} if "auto_map" in self.written_config("") else {}),
            **self.server_args,
        }
        return on(self.gpu, LoadJob(path, server_args=arguments, draft=path if self.is_draft else None))

    def written_config(self, architecture: str) -> Config:
        """What ``config.json`` holds."""
        own = self.config() if callable(self.config) else self.config
        config = {**own, "torch_dtype": "bfloat16", "architectures": [self.named_in_config or architecture]}
        if "model_type" in config:
            return config
        return {**config, "model_type": "tiny", "auto_map": {"AutoConfig": "configuration_tiny.Nested"}}


def on(gpu: str, job: LoadJob) -> LoadJob:
    """The job on a stand-in GPU; on the CPU if none is named."""
    if not gpu:
        return job
    # Of the tests, whose folder ``ci/sweep`` adds to the path.
    from standin.gpus import SERVER_ARGS

    return replace(job, device="cuda", server_args={**SERVER_ARGS, **job.server_args})


def of_transformers(architecture: str, **changes: Any) -> Callable[[], Config]:
    """The tiny config of an architecture of ``transformers``, with further keys; dotted ones go into nested dicts."""

    def config() -> Config:
        made: Config = json.loads(tiny_config(architecture).to_json_string(use_diff=False))
        for key, value in {**SPECIAL.get(architecture, {}), **PUBLISHED.get(architecture, {}), **changes}.items():
            put(made, key.split("."), value)
        return made

    return config


def build(
    architecture: str, published: Published, folder: Path, workers: LoadWorkers, beside: Path | None = None
) -> Path:
    """Write a checkpoint of `architecture` into a folder of its name under `folder`, unless it exists.

    Args:
        architecture: its name.
        published: its data.
        folder: of all checkpoints.
        workers: that build and load SGLang's model.
        beside: the checkpoint of ``published.beside``.

    Raises:
        LoadFailed: SGLang cannot build the model of this config, or stock cannot load the checkpoint in bf16.
        ValueError: stock's load left parameters unwritten.
    """
    path = folder / architecture
    if path.exists():
        return path
    draft = folder / f".{architecture}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / "config.json").write_text(json.dumps(published.written_config(architecture), indent=2))
    (draft / "configuration_tiny.py").write_text(_CONFIGURATION.replace("MODEL_TYPE", "tiny"))
    job = replace(published.job(draft), streaming="0", quantization=None, described="layouts")
    model = workers.load(replace(job, server_args={**job.server_args, "load_format": "dummy"}))
    tensors = made(published_tensors(model.ranks[0].layouts, published))
    if beside is not None:
        for file in beside.glob("*.safetensors"):
            tensors = {**load_file(file), **tensors}
    _save(tensors, published, draft)
    stock = workers.load(replace(job, uninitialized=math.nan))
    lacking = [one.name for one in stock.ranks[0].layouts if one.is_unwritten]
    lacking = [name for name in lacking if not published.lacks or not re.search(published.lacks, name)]
    if lacking:
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}")
    draft.rename(path)
    return path


def _save(tensors: dict[str, torch.Tensor], published: Published, folder: Path) -> None:
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        file = next(file for pattern, file in published.files.items() if re.search(pattern, name))
        files.setdefault(file, {})[name] = tensor
    for file, there in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(there, folder / file, metadata={"format": "pt"})


def published_tensors(layouts: tuple[WeightLayout, ...], published: Published) -> Tensors:
    """What the checkpoint holds of a model of these parameters."""
    tensors: Tensors = {}
    for layout in layouts:
        for name, shape in _taken_apart(layout, published):
            for pattern, replacement in published.names:
                name = re.sub(pattern, replacement, name)
            if name:
                tensors[name] = (shape, layout.dtype)
    return tensors if published.adjust is None else published.adjust(tensors)


def _taken_apart(layout: WeightLayout, published: Published) -> list[tuple[str, tuple[int, ...]]]:
    owner, _, leaf = layout.name.rpartition(".")
    if leaf in _EXPERTS and published.experts:
        return _experts(owner, leaf, layout, published.experts)
    above = owner.rpartition(".")[0]
    splits = (*published.splits.items(), *SPLITS.items())
    named = next((parts for pattern, parts in splits if re.search(rf"(?:^|\.)(?:{pattern})$", owner)), ())
    parts = _parts(named, layout)
    if not parts:
        return [(layout.name, layout.shape)]
    prefix = f"{above}." if above else ""
    return [(f"{prefix}{name}.{leaf}", (rows, *layout.shape[1:])) for name, rows in parts]


def _parts(named: tuple[Part, ...], layout: WeightLayout) -> list[tuple[str, int]]:
    """Names of the parts of a fused layer, with their rows; none if the layer is one matrix."""
    names = [part for part in named if isinstance(part, str)]
    if names:
        return list(zip(names, layout.parts, strict=True)) if layout.parts else []
    parts = [part for part in named if not isinstance(part, str)]
    if parts and sum(rows for _, rows in parts) != layout.shape[0]:
        raise ValueError(f"{layout.name} has {layout.shape[0]} rows, which are not those of {parts}")
    return parts


def _experts(owner: str, leaf: str, layout: WeightLayout, names: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    gate, up, down = names
    count, rows, *columns = layout.shape
    matrices = [(down, rows)] if leaf.startswith("w2") else [(up, rows)]
    if leaf.startswith("w13") and layout.is_gated:
        matrices = [(gate, rows // 2), (up, rows // 2)]
    return [
        (f"{owner}.{expert}.{name}.{_EXPERTS[leaf]}", (height, *columns))
        for expert in range(count)
        for name, height in matrices
    ]


def made(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, filled as ``families.fill`` does; whole numbers are 0 and 1."""
    created = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    fill({name: tensor for name, tensor in created.items() if tensor.is_floating_point()})
    for tensor in created.values():
        if not tensor.is_floating_point():
            tensor.view(-1)[1::2] = 1
    return created
