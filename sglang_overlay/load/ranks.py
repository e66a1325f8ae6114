# SPDX-License-Identifier: Apache-2.0
"""This process's place in SGLang's parallel groups."""

from __future__ import annotations

from typing import Any

import torch

from sglang_overlay.observe.report import ParallelRank, Ranks


def parallel_ranks() -> Ranks:
    """This process's ranks; rank 0 of 1 in every kind of parallelism that is not set up."""
    from sglang.srt.distributed import parallel_state

    return Ranks(
        tp=_rank(parallel_state, "get_tp_group"),
        pp=_rank(parallel_state, "get_pp_group"),
        ep=_rank(parallel_state, "get_moe_ep_group"),
    )


def gathered(mine: Any) -> list[Any]:
    """``mine`` of each rank of the tensor parallel group, in rank order. A collective: all ranks have to call it."""
    from sglang.srt.distributed import parallel_state

    try:
        group = parallel_state.get_tp_group()
    except (AttributeError, AssertionError, RuntimeError):
        # Not set up, so there is one rank.
        return [mine]
    if group.world_size == 1:
        return [mine]
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    return found


def _rank(parallel_state: Any, getter: str) -> ParallelRank:
    try:
        group = getattr(parallel_state, getter)()
        return ParallelRank(group.rank_in_group, group.world_size)
    except (AttributeError, AssertionError, RuntimeError):
        return ParallelRank()
