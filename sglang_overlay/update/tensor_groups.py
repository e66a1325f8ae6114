# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tensors that a model only loads together, even if an update sends them in different calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from sglang_overlay.core.staging import StagingAccount

FUSED_BY_THE_MODEL = {
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_g_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
}
"""Layers whose weight a model fuses itself, by the last part of their name, and the checkpoint tensors it fuses.

``load_weights`` of deepseek_v2 and its relatives (bailing_moe, glm4_moe_lite, glm5_next, kimi_k25_eagle3,
longcat_flash, dots3) waits for all of them, but only within one call: it silently drops a tensor that comes alone.
"""


class TensorGroups:
    """Holds tensors that only load together until upstream can get all of them in one call.

    Args:
        layers: names of the model's layers.
        account: counts the memory of held tensors.
    """

    def __init__(self, layers: Iterable[str], account: StagingAccount) -> None:
        self._account = account
        last = {name.rpartition(".")[2] for name in layers}
        self._parts = {part: fused for fused, parts in FUSED_BY_THE_MODEL.items() if fused in last for part in parts}
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def complete(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights``, but tensors of a group are held until all of it has come, then yielded together."""
        for name, tensor in weights:
            part = next((part for part in name.split(".") if part in self._parts), None)
            # A pickled file may hold anything.
            if part is None or not isinstance(tensor, torch.Tensor):
                yield name, tensor
                continue
            fused = self._parts[part]
            whole = name.replace(part, fused)
            others = self._held.setdefault(whole, {})
            self._account.add(-_bytes_of(others.pop(name, None)))
            if len(others) + 1 == len(FUSED_BY_THE_MODEL[fused]):
                del self._held[whole]
                yield from {**others, name: tensor}.items()
                self._account.add(-sum(map(_bytes_of, others.values())))
            else:
                # The sender may reuse the tensor's memory.
                others[name] = tensor.clone()
                self._account.add(tensor.nbytes)

    @property
    def waiting(self) -> list[str]:
        """Names of fused weights that have been sent only in part."""
        return list(self._held)

    def saved(self) -> dict[str, dict[str, torch.Tensor]]:
        """A snapshot for ``restore``."""
        return {whole: dict(others) for whole, others in self._held.items()}

    def restore(self, saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go back to the state at the time of ``saved``."""
        self._account.add(-self._size)
        self._held = {whole: dict(others) for whole, others in saved.items()}
        self._account.add(self._size)

    @property
    def _size(self) -> int:
        return sum(_bytes_of(tensor) for others in self._held.values() for tensor in others.values())


def _bytes_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
