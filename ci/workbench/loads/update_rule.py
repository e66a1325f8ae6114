"""Random weight updates of one loaded model, checked against one rule: each rank holds what its answer says.

After success these are the new weights, after failure the previous ones, bit for bit, and all ranks give the same
answer. A step of ``LoadJob``; every rank makes the same updates, some of which fail on one rank.
"""

from __future__ import annotations

import contextlib
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.load.ranks import gathered
from workbench.loads.fingerprints import named_tensors
from workbench.loads.updates import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NamedTensor = tuple[str, torch.Tensor]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that SGLang fuses, and the checkpoint's layers in each, in the order of their rows."""
_FUSED_OF = {part: fused for fused, parts in FUSED.items() for part in parts}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)$")
_STACKED = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}

SPOILT = ("shape", "fp8", "integer", "half", "reader")
"""How a tensor of an update may be wrong: another shape, fp8 without scale, integers, left out, unreadable."""


@dataclass(frozen=True)
class RandomUpdates:
    """A series of random updates.

    Args:
        checkpoints: of one model, with different weights everywhere; the first is the one that was loaded.
        ready: for each of these, a folder with the same weights quantized in blocks, as they are then served; or empty.
            With blocks, each part of a fused layer is replaced separately; otherwise its parts share a scale.
        first: number of the first update; its number alone determines each update.
        count: number of updates.
        lora: whether SGLang's LoRA layers are put around the model's linear layers.
    """

    checkpoints: tuple[Path, ...]
    ready: tuple[Path, ...] = ()
    first: int = 0
    count: int = 1
    lora: bool = False


@dataclass
class RuleResult:
    """One rank's results.

    Args:
        answers: of each update: its number, its description, and each of its answers.
        broken: violations of the rule.
    """

    answers: list[tuple[int, str, tuple[bool, ...]]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    success: bool = True
    message: str = ""


@dataclass
class _Case:
    """One random update.

    Args:
        source: ``tensor``, ``bucket`` or ``disk``.
        version: which checkpoint it sends.
        calls: names of the tensors of each call.
        spoilt: how one of them is wrong; empty if none is.
        victim: that tensor.
        rank: where it is wrong, or where memory runs out; -1 is all ranks, as always for a tensor that is left out.
        writes: number of writes on that rank that succeed before memory runs out; None if it does not.
        retries: whether a failed call is repeated correctly.
        dtype: of the tensors.
        is_ready: whether they are sent quantized.
    """

    source: str
    version: int
    calls: list[list[str]]
    spoilt: str
    victim: str
    rank: int
    writes: int | None
    retries: bool
    dtype: torch.dtype
    is_ready: bool

    @property
    def is_clean(self) -> bool:
        return not self.spoilt and self.writes is None

    def __str__(self) -> str:
        fault = f", {self.spoilt} {self.victim} on rank {self.rank}" if self.spoilt else ""
        fault += "" if self.writes is None else f", out of memory after {self.writes} writes on rank {self.rank}"
        kind = "ready" if self.is_ready else str(self.dtype)
        sizes = [len(names) for names in self.calls]
        return f"{self.source} {kind} version {self.version}, {sizes} tensors a call{fault}, retries {self.retries}"


class Rule:
    """Makes random updates of one runner's model and checks the rule.

    Args:
        runner: SGLang's ``ModelRunner``.
        updates: which.
    """

    def __init__(self, runner: Any, updates: RandomUpdates) -> None:
        self._updater = getattr(runner, "weight_updater", runner)
        self._model, self._rank = runner.model, _rank()
        self._ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self._updates = updates
        if updates.lora:
            wrap_in_lora(self._model)
        self._plain = [dict(tensors_of(path)) for path in updates.checkpoints]
        self._ready = [dict(tensors_of(path)) for path in updates.ready]
        self._groups = sorted({self._group_of(name) for name in self._plain[0]})
        self._held = dict.fromkeys(self._groups, 0)
        self._states = [self._state_of(path) for path in (*updates.checkpoints[1:], updates.checkpoints[0])]
        self._states.insert(0, self._states.pop())
        self._is_lost = False
        self.result = RuleResult()
        alike = [name for name in self._weights_of(0) if _same(self._states[0][name], self._states[1][name])]
        if alike:
            raise RuntimeError(f"full updates leave these as they were: {alike}")

    def run(self) -> RuleResult:
        """Make all updates."""
        # Tensors are too small for several threads.
        torch.set_num_threads(1)
        for number in range(self._updates.first, self._updates.first + self._updates.count):
            case = self._case(random.Random(number))
            answers = self._make(number, case)
            self.result.answers.append((number, str(case), tuple(answers)))
            if self._is_lost:
                self._held = dict.fromkeys(self._groups, 0)
                self._state_of(self._updates.checkpoints[0])
                self._is_lost = False
        self.result.success = not self.result.broken
        self.result.message = "\n".join(self.result.broken[:20])
        return self.result

    # -- making one --------------------------------------------------------------------------------------------------

    def _case(self, chance: random.Random) -> _Case:
        is_ready = bool(self._ready) and chance.random() < 0.5
        version = chance.randrange(len(self._plain))
        tensors = (self._ready if is_ready else self._plain)[version]
        groups = self._groups if chance.random() < 0.2 else chance.sample(self._groups, chance.randrange(1, 9))
        names = [name for name in tensors if self._group_of(name) in set(groups)]
        chance.shuffle(names)
        source = chance.choice(("tensor", "tensor", "bucket", "disk"))
        # Another test reads a checkpoint in a random order.
        size = len(names) if source == "disk" else -(-len(names) // chance.randrange(1, 5))
        # On disk, one tensor can be left out or be unreadable; a bucket is read as a whole.
        ways = {"disk": SPOILT[-2:], "bucket": SPOILT[:-1]}.get(source, SPOILT)
        spoilt = chance.choice(ways) if chance.random() < 0.4 else ""
        runs_out = not spoilt and chance.random() < 0.4
        retries = chance.random() < 0.5
        if not self._has_sessions and source != "disk":
            # Without a session, what is left out of one update would be taken from a later one.
            spoilt = "" if spoilt == "half" else spoilt
            size = size if retries or not (spoilt or runs_out) else len(names)
        return _Case(
            source,
            version,
            [names[start : start + size] for start in range(0, len(names), size)],
            spoilt,
            chance.choice(names),
            -1 if spoilt == "half" else chance.randrange(-1, self._ranks),
            chance.randrange(2 * len(names)) if runs_out else None,
            retries,
            chance.choice((torch.bfloat16, torch.float32)),
            is_ready,
        )

    def _make(self, number: int, case: _Case) -> list[bool]:
        before, arrived = dict(self._held), set[str]()
        answers: list[bool] = []
        in_session = self._has_sessions and case.source != "disk"
        if in_session:
            self._updater.begin_weight_update()
        for names in case.calls:
            success, message = self._call(case, names)
            answers.append(success)
            come = {name for name in names if not (case.spoilt == "half" and name == case.victim)}
            if not success and case.retries and case.source != "disk":
                self._check(number, case, message)
                success, message = self._call(_right(case), names)
                answers.append(success)
                come = set(names)
            arrived |= come if success else set()
            self._held = {**before, **dict.fromkeys(self._whole(case, arrived), case.version)}
            self._check(number, case, message)
        if in_session:
            success, message = self._end()
            answers.append(success)
            self._held = self._held if success else before
            self._check(number, case, message)
            touched = {self._group_of(name) for name in arrived}
            if success and self._whole(case, arrived) != touched:
                self._break(number, case, "the update succeeded without all of its tensors", message)
        if case.is_clean and not all(answers):
            self._break(number, case, "nothing was wrong with it, and it failed", message)
        return answers

    def _call(self, case: _Case, names: Sequence[str]) -> tuple[bool, str]:
        with self._memory(case):
            try:
                if case.source == "disk":
                    return self._read(case, set(names))
                return self._send(case, list(self._tensors(case, names)))
            except Exception as error:
                return False, f"raised {type(error).__name__}: {error}"

    def _read(self, case: _Case, names: set[str]) -> tuple[bool, str]:
        def wanted(name: str) -> bool:
            if self._is_spoilt(case, name) and case.spoilt == "reader":
                raise OSError("this file is gone")
            return name in names and not (self._is_spoilt(case, name) and case.spoilt == "half")

        folders = self._updates.ready if case.is_ready else self._updates.checkpoints
        answer: tuple[bool, str] = self._updater.update_weights_from_disk(
            str(folders[case.version]), "auto", weight_name_filter=wanted
        )
        return answer

    def _send(self, case: _Case, tensors: list[NamedTensor]) -> tuple[bool, str]:
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        answer: tuple[bool, str]
        if case.source == "bucket" and tensors:
            bucket = FlattenedTensorBucket(named_tensors=tensors)
            content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
            answer = self._updater.update_weights_from_tensor(content, "flattened_bucket")
            content["flattened_tensor"].fill_(0)
            return answer
        answer = self._updater.update_weights_from_tensor(tensors, None)
        for _, tensor in tensors:
            tensor.zero_()
        return answer

    def _tensors(self, case: _Case, names: Sequence[str]) -> Iterator[NamedTensor]:
        source = (self._ready if case.is_ready else self._plain)[case.version]
        for name in names:
            tensor = source[name].clone() if case.is_ready else source[name].to(case.dtype, copy=True)
            if not self._is_spoilt(case, name):
                yield name, tensor
            elif case.spoilt == "shape":
                yield name, tensor[None].repeat(3, *[1] * tensor.ndim)
            elif case.spoilt == "fp8":
                yield name, tensor.to(torch.float8_e5m2)
            elif case.spoilt == "integer":
                yield name, tensor.to(torch.int32)
            elif case.spoilt == "reader":
                yield name, _Unreadable(tensor)

    def _is_spoilt(self, case: _Case, name: str) -> bool:
        return bool(case.spoilt) and name == case.victim and case.rank in (-1, self._rank)

    @contextlib.contextmanager
    def _memory(self, case: _Case) -> Iterator[None]:
        """Make memory run out where the case says so: between writes, the worst moment."""
        from sglang_overlay.offline.plan.replacing import replaced
        from sglang_overlay.update.undo import UndoLog

        left = [case.writes]
        keep = UndoLog.keep

        def run_out(log: UndoLog, *views: torch.Tensor) -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise torch.OutOfMemoryError("no memory left")
            keep(log, *views)

        if case.writes is None or case.rank not in (-1, self._rank):
            yield
            return
        with replaced(UndoLog, "keep", run_out):
            yield

    def _end(self) -> tuple[bool, str]:
        try:
            self._updater.end_weight_update(run_post_load=False)
        except Exception as error:
            return False, str(error)
        return True, ""

    @property
    def _has_sessions(self) -> bool:
        return hasattr(self._updater, "begin_weight_update")

    # -- the rule ----------------------------------------------------------------------------------------------------

    def _group_of(self, name: str) -> str:
        """Name of the group of checkpoint tensors that are replaced together, since they share a scale."""
        layer = re.sub(r"\.(weight|weight_scale|weight_scale_inv)$", "", name)
        parent, _, last = layer.rpartition(".")
        return f"{parent}.{last if self._ready else _FUSED_OF.get(last, last)}".lstrip(".")

    def _whole(self, case: _Case, arrived: set[str]) -> set[str]:
        """Groups of which all tensors have been sent."""
        tensors = (self._ready if case.is_ready else self._plain)[case.version]
        missing = {self._group_of(name) for name in tensors if name not in arrived}
        return {self._group_of(name) for name in arrived} - missing

    def _state_of(self, path: Path) -> dict[str, torch.Tensor]:
        success, message = self._updater.update_weights_from_disk(str(path), "auto")
        if not success:
            raise RuntimeError(f"a full update failed: {message}")
        return self._state()

    def _weights_of(self, version: int) -> list[str]:
        return [name for name in self._states[version] if name.endswith("weight")]

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            name.replace(".base_layer", ""): tensor.detach().clone()
            for kind, name, tensor in named_tensors(self._model)
            if kind != "attribute" or tensor.is_floating_point()
        }

    def _expected(self, name: str) -> torch.Tensor | Sequence[torch.Tensor]:
        layer, _, key = name.rpartition(".")
        if layer.endswith(".experts"):
            kind = "gate_up_proj" if key.startswith("w13") else "down_proj"
            experts = len(self._states[0][name])
            return [self._states[self._held[f"{layer}.{one}.{kind}"]][name][one] for one in range(experts)]
        parent, _, last = layer.rpartition(".")
        if self._ready and last in FUSED:
            return self._rows(name, [f"{parent}.{part}" for part in FUSED[last]])
        return self._states[self._held.get(layer, 0)][name]

    def _rows(self, name: str, parts: Sequence[str]) -> torch.Tensor:
        """A fused tensor with the expected rows of each part."""
        heights = [len(self._plain[0][f"{part}.weight"]) for part in parts]
        rows = [len(self._states[0][name]) * height // sum(heights) for height in heights]
        pieces = zip(*(state[name].split(rows) for state in self._states), strict=True)
        return torch.cat([piece[self._held[part]] for part, piece in zip(parts, pieces, strict=True)])

    def _check(self, number: int, case: _Case, message: str) -> None:
        if self._is_lost:
            return
        wrong = [name for name, tensor in self._state().items() if not _same(tensor, self._expected(name))]
        if wrong:
            self._break(number, case, f"holds something else in {wrong[:6]}", message)
        # So that one fault is reported only once, and all ranks continue from the same state.
        self._is_lost = any(gathered(bool(wrong)))

    def _break(self, number: int, case: _Case, what: str, message: str) -> None:
        self.result.broken.append(f"rank {self._rank}, update {number} ({case}): {what}; it had said: {message}")


class _Unreadable(torch.Tensor):
    """A tensor that raises when it is read."""

    @staticmethod
    def __new__(cls: Any, tensor: torch.Tensor) -> _Unreadable:
        made: _Unreadable = torch.Tensor._make_subclass(cls, tensor)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.narrow, torch.Tensor.__getitem__, torch.Tensor.view):
            raise torch.OutOfMemoryError("this tensor cannot be read")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _right(case: _Case) -> _Case:
    return _Case(**{**vars(case), "spoilt": "", "writes": None})


def _same(tensor: torch.Tensor, expected: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    whole = expected if isinstance(expected, torch.Tensor) else torch.stack(list(expected))
    alike = (tensor.shape, tensor.dtype) == (whole.shape, whole.dtype)
    return alike and torch.equal(_bytes(tensor), _bytes(whole))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Strides are ignored: a stack of experts does not keep them.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def wrap_in_lora(model: torch.nn.Module) -> None:
    """Put SGLang's LoRA layers around linear layers and experts of a loaded model, as its ``LoRAManager`` does."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
    from sglang.srt.lora.layers import get_lora_layer
    from sglang.srt.utils import replace_submodule

    from sglang_overlay.offline.plan.replacing import replaced

    def unpinned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return make(*args, **{**kwargs, "pin_memory": False})

    make = torch.tensor
    backend = TorchNativeLoRABackend(1, torch.device("cpu"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (LinearBase, FusedMoE))}
    # SGLang's LoRA pins memory even without a GPU.
    with replaced(torch, "tensor", unpinned):
        for name, layer in layers.items():
            replace_submodule(model, name, get_lora_layer(layer, backend))


def run(runner: Any, updates: RandomUpdates) -> RuleResult:
    """Make ``updates`` of the model of ``runner``."""
    return Rule(runner, updates).run()
