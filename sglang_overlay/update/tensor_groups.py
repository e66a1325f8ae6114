# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tensors that a model only loads together, however an update splits them over its calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from sglang_overlay.core.staging import StagingAccount

FUSED_BY_THE_MODEL = {
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_g_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
}
"""Layers whose weight a model puts together itself, by the last part of their name, from these checkpoint tensors.

``load_weights`` of deepseek_v2 and its relatives (bailing_moe, glm4_moe_lite, glm5_next, kimi_k25_eagle3,
longcat_flash, dots3) waits for all of them, but only within one call: one that comes alone is dropped without a word.
"""


class TensorGroups:
    """Hands tensors that only load together to upstream in one call, whichever calls of an update they come in.

    Args:
        layers: names of the model's layers.
        account: counts what is held for those to come.
    """

    def __init__(self, layers: Iterable[str], account: StagingAccount) -> None:
        self._account = account
        last = {name.rpartition(".")[2] for name in layers}
        self._parts = {part: fused for fused, parts in FUSED_BY_THE_MODEL.items() if fused in last for part in parts}
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def complete(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights``, without those that wait for others of their group, and with those that do so no longer."""
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
                # The sender may use the tensor's memory again.
                others[name] = tensor.clone()
                self._account.add(tensor.nbytes)

    @property
    def waiting(self) -> list[str]:
        """Names of fused weights of which a part has not come."""
        return list(self._held)

    def saved(self) -> dict[str, dict[str, torch.Tensor]]:
        """What ``restore`` goes back to."""
        return {whole: dict(others) for whole, others in self._held.items()}

    def restore(self, saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Hold again what was held when ``saved`` was made."""
        self._account.add(-self._size)
        self._held = {whole: dict(others) for whole, others in saved.items()}
        self._account.add(self._size)

    @property
    def _size(self) -> int:
        return sum(_bytes_of(tensor) for others in self._held.values() for tensor in others.values())


def _bytes_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
