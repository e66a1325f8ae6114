"""Experts of a loaded model moved between slots and ranks, as EPLB does it at run time: a step of ``LoadJob``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rebalance:
    """One rebalance.

    Args:
        placement: the expert that each slot of all ranks is to hold, the same in every layer.
    """

    placement: tuple[int, ...]


@dataclass(frozen=True)
class RebalanceResult:
    """The placement afterwards, of each layer, by SGLang's own map."""

    placements: tuple[tuple[int, ...], ...]


def run(runner: Any, rebalance: Rebalance) -> RebalanceResult:
    """Move the experts of ``runner``, a ``ModelRunner``; all ranks have to."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata, get_global_expert_location_metadata

    from workbench.loads import runtime

    weights, current = runner.model.routed_experts_weights_of_layer, get_global_expert_location_metadata()
    rank = parallel_state.get_moe_ep_group().rank_in_group
    wanted = runtime.told(
        ExpertLocationMetadata.init_by_mapping,
        server_args=runner.server_args,
        model_config=runner.model_config,
        physical_to_logical_map=[rebalance.placement] * current.num_layers,
        moe_ep_rank=rank,
    )
    updater = runner.expert_location_updater
    # The first time it empties the cache of a GPU's allocator, and a CPU has none.
    updater._first_execution = False
    updater.update(weights, wanted, update_layer_ids=sorted(weights.keys()), nnodes=1, rank=rank)
    return RebalanceResult(tuple(map(tuple, current.physical_to_logical_map_cpu.tolist())))
