# SPDX-License-Identifier: Apache-2.0
"""Plans whose scales cover whole rows, even if tensor parallelism gives each rank only some of their columns."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from sglang_overlay.core.messages import shortened
from sglang_overlay.core.placeholders import set_loader
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.whole_rows import LoadedTensor, WholeRows, WholeRowsQuantizer
from sglang_overlay.schemes.layer_plan import LayerPlan, ParameterPlan, Placeholders


@dataclass(frozen=True)
class WholeRowsPlan(ParameterPlan):
    """How a parameter that holds only some columns of its rows is quantized.

    Attributes:
        rows: magnitudes of the whole rows. The parameter's stream has to pass writes to its ``see`` and ``note``.
    """

    rows: WholeRows


class WholeRowScales(LayerPlan):
    """Mixin, to be the first base class of a plan with per-row scales: makes them scales of the checkpoint's rows.

    Attributes:
        split: for each parameter with only some columns, the tensor its loader was given and a whole row's columns.
    """

    split: Mapping[str, tuple[LoadedTensor, int]] = MappingProxyType({})

    @abc.abstractmethod
    def whole_columns(self, layer: torch.nn.Module, name: str, columns: int) -> int:
        """Columns of a whole row of the parameter ``name``, of which this rank has ``columns``."""

    def create(self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype) -> Placeholders:
        made = super().create(create, layer, dtype)  # type: ignore[safe-super]
        split = {}
        for name, placeholder in made.parameters.items():
            columns = self.whole_columns(layer, name, placeholder.shape[-1])
            if columns > placeholder.shape[-1]:
                loaded = LoadedTensor()
                set_loader(placeholder, loaded.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
                split[name] = loaded, columns
        self.split = split
        return made

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        plan = super().parameter(name, placeholder, storage)  # type: ignore[safe-super]
        if name not in self.split:
            return plan
        rows = WholeRows(*self.split[name], plan.grid, placeholder.dtype)
        quantizer = WholeRowsQuantizer(plan.quantizer, rows, plan.storage.scale)
        return WholeRowsPlan(plan.grid, quantizer, plan.storage, rows)


def of(plan: ParameterPlan) -> WholeRows | None:
    """The whole rows of a parameter that holds only some of their columns; None for other parameters."""
    return plan.rows if isinstance(plan, WholeRowsPlan) else None


def are_split(plan: LayerPlan) -> bool:
    """Whether a layer holds only some columns of its rows."""
    return isinstance(plan, WholeRowScales) and bool(plan.split)


def narrowed_note(names: Sequence[str]) -> str:
    """A message about parameters of whose rows only some columns were seen."""
    return (
        f"the weight loaders of {shortened(names)} were given some columns of rows that ranks share, so scales are of "
        "these columns, and others at another tensor parallel size"
    )
