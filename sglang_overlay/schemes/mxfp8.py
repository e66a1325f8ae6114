# SPDX-License-Identifier: Apache-2.0
"""``mxfp8``: a bf16 checkpoint under SGLang's own ``--quantization mxfp8``.

e4m3 values; each 32 consecutive ones of a row share a power of two (OCP Microscaling Formats 1.0), whose exponent is a
byte (UE8M0). Stock quantizes each layer after it has been loaded (``Fp8LinearMethod._quantize_mxfp8_weights``,
``Fp8MoEMethod._process_mxfp8_moe_weights``) and then arranges values and scales for a kernel. Here the same function
quantizes rows while they are loaded, into the form of an MXFP8 checkpoint, and upstream continues as with one.

This is not a ``Scheme``: SGLang's ``--quantization`` chooses it, not ``SGLANG_STREAMFP8_SCHEME``.
"""

from __future__ import annotations

import abc
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module, Parameter

from sglang_overlay.core.load_errors import UnexpectedParametersError
from sglang_overlay.core.placeholders import twin
from sglang_overlay.core.quantizer import aligned
from sglang_overlay.core.quantizers import RowQuantizer, UnitQuantizer, is_rounding_of
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes import capabilities
from sglang_overlay.schemes.layer_plan import LayerPlan, OnlinePlan, ParameterPlan, Placeholders

GROUP = 32
"""Consecutive values of a row that share a scale."""
BIAS = 127
"""Bias of the stored exponents."""


def is_online(config: Any) -> bool:
    """Whether this is SGLang's own MXFP8 config over a high-precision checkpoint."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return (
        type(config) is Fp8Config
        and config.use_mxfp8
        and not config.is_checkpoint_fp8_serialized
        and not capabilities.has_fp4_experts(config)
    )


class Mxfp8Plan(OnlinePlan):
    """Streams weights ``[..., N, K]`` into values of that shape and exponents ``[..., N, K / 32]``, uint8."""

    def create(self, create: Callable[[], None], layer: Module, dtype: torch.dtype) -> Placeholders:
        from sglang.srt.utils import is_hip

        reason = "MXFP8 on ROCm has layouts of its own" if is_hip() else self.why_not(layer)
        if reason is not None:
            raise UnexpectedParametersError(reason)
        made = super().create(create, layer, dtype)
        for name, weight in made.parameters.items():
            if weight.shape[-1] % GROUP:
                raise UnexpectedParametersError(
                    f"{name} has rows of {weight.shape[-1]}, and MXFP8 needs a multiple of {GROUP}"
                )
        # Taken before loaders are wrapped. Stock keeps the parameter and its attributes, and only changes its data.
        self._likes = {
            name: twin(weight, torch.empty_like(weight, device="meta")) for name, weight in made.parameters.items()
        }
        return made

    @abc.abstractmethod
    def why_not(self, layer: Module) -> str | None:
        """Why stock has to quantize the layer; None if it can be streamed."""

    def quantizer(self) -> UnitQuantizer:
        """Turns rows into values and exponents with upstream's own function."""
        from sglang.srt.layers.quantization import fp8

        return GroupQuantizer(fp8.mxfp8_group_quantize)

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        # Units are a row, or an expert's matrix: loaders may write several at once, or leave out rows.
        return ParameterPlan(UnitGrid.per_slice(placeholder.shape), self.quantizer(), storage)

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        for name, storage in storages.items():
            like = self._likes[name]
            layer._parameters[name] = twin(like, storage.weight.view(like.shape))

    def process(self, original: Callable[[], None], method: Any, layer: Module) -> None:
        with _as_of_a_checkpoint(method):
            original()

    def registered(self, layer: Module, placeholders: Mapping[str, Parameter]) -> dict[str, Storage] | None:
        pairs = {name: (layer.get_parameter(name), layer.get_parameter(f"{name}_scale_inv")) for name in placeholders}
        if any(weight.is_cuda for weight, _ in pairs.values()):
            return None  # Rearranged for a kernel, which some kernels' shapes do not show.
        return {name: _storage(weight.data, scale.data) for name, (weight, scale) in pairs.items()}

    def scale_placeholders(
        self, layer: Module, placeholders: Mapping[str, Parameter]
    ) -> dict[str, tuple[str, Parameter]]:
        """Exponents as in MXFP8 checkpoints, with the weights' own loaders."""
        made = {}
        for name, weight in placeholders.items():
            exponents = torch.empty(*weight.shape[:-1], weight.shape[-1] // GROUP, dtype=torch.uint8, device="meta")
            made[name] = f"{name}_scale_inv", self.scale_placeholder(exponents, weight)
        return made

    @abc.abstractmethod
    def scale_placeholder(self, exponents: torch.Tensor, weight: Any) -> Parameter:
        """A placeholder for the exponents of ``weight``, as upstream creates the parameter for an MXFP8 checkpoint."""


class Mxfp8LinearPlan(Mxfp8Plan):
    """``weight`` ``[N, K]``, each row a unit, and ``weight_scale_inv`` ``[N, K / 32]``."""

    weights = frozenset({"weight"})

    def why_not(self, layer: Module) -> str | None:
        return _why_converted(layer)

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        rows, columns = placeholder.shape
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
        return _storage(weight, torch.empty(rows, columns // GROUP, dtype=torch.uint8, device=device))

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        super().register(layer, storages)
        layer.register_parameter("weight_scale_inv", Parameter(storages["weight"].scale, requires_grad=False))
        layer.input_scale = None  # type: ignore[assignment]

    def scale_placeholder(self, exponents: torch.Tensor, weight: Any) -> Parameter:
        from sglang.srt.layers.parameter import BlockQuantScaleParameter

        loader = weight.weight_loader
        made: Any = BlockQuantScaleParameter(data=exponents, input_dim=1, output_dim=0, weight_loader=loader)
        # Loaders count such scales in rows.
        made.format_ue8m0 = True
        return made  # type: ignore[no-any-return]


class Mxfp8ExpertsPlan(Mxfp8Plan):
    """``w13_weight`` ``[E, 2I, H]`` and ``w2_weight`` ``[E, H, I]``; upstream creates their scales itself."""

    weights = frozenset({"w13_weight", "w2_weight"})
    fills = frozenset({"w13_weight_scale_inv", "w2_weight_scale_inv"})

    def create(self, create: Callable[[], None], layer: Module, dtype: torch.dtype) -> Placeholders:
        made = super().create(create, layer, dtype)
        self._scales = {name: layer.get_parameter(f"{name}_scale_inv") for name in made.parameters}
        self._scale_likes = {
            name: twin(scale, torch.empty_like(scale, device="meta")) for name, scale in self._scales.items()
        }
        return made

    def again(self) -> LayerPlan:
        plan = copy.copy(self)
        plan._scales = {}
        return plan

    def why_not(self, layer: Module) -> str | None:
        from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend

        if get_moe_runner_backend().is_cutlass():
            return "with --moe-runner-backend cutlass experts are quantized by a kernel that takes all of them at once"
        a2a = get_moe_a2a_backend()
        if hasattr(a2a, "is_flashinfer_megamoe") and a2a.is_flashinfer_megamoe():
            return "with --moe-a2a-backend flashinfer_megamoe experts are quantized by a kernel of its own"
        return _why_converted(layer)

    def quantizer(self) -> UnitQuantizer:
        from sglang.srt.layers.moe.utils import get_moe_runner_backend

        backend = get_moe_runner_backend()
        if not (backend.is_flashinfer_trtllm() or backend.is_flashinfer_trtllm_routed()):
            return super().quantizer()
        flashinfer_quantize = _flashinfer_quantizer()

        def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, exponents = flashinfer_quantize(rows, False)
            return values, exponents.view(torch.uint8)

        return GroupQuantizer(quantize)

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        weight = torch.empty(placeholder.shape, dtype=torch.float8_e4m3fn, device=device)
        like = self._scale_likes[name]
        scale = self._scales[name].data if name in self._scales else torch.empty_like(like, device=device)
        return _storage(weight, scale)

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        super().register(layer, storages)
        for name, storage in storages.items():
            # At a load upstream's own is there, and stays.
            if name not in self._scales:
                like = self._scale_likes[name]
                layer._parameters[f"{name}_scale_inv"] = twin(like, storage.scale.view(like.shape))

    def scale_placeholder(self, exponents: torch.Tensor, weight: Any) -> Parameter:
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoeWeightScaleSupported

        made: Any = twin(weight, exponents)
        made.quant_method = FusedMoeWeightScaleSupported.BLOCK.value
        return made  # type: ignore[no-any-return]


class GroupQuantizer(RowQuantizer):
    """Quantizes rows whose groups have an exponent each; a unit is one or several rows.

    Args:
        function: upstream's ``[rows, columns] -> (e4m3 [rows, columns], uint8 exponents, one per group)``.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(function)
        self.kernel = function

    def _quantize_rows(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super()._quantize_rows(rows if rows.is_cpu else aligned(rows), weight, scale)

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        powers = torch.exp2(scale.view(*weight.shape[:-1], -1).float() - BIAS).repeat_interleave(GROUP, -1)
        return is_rounding_of(weight[slices(piece.box)], powers[slices(piece.box)], piece.values)


@contextmanager
def _as_of_a_checkpoint(method: Any) -> Iterator[None]:
    """Make a quantization method treat its layer as one of an MXFP8 checkpoint, so that it only rearranges weights."""
    # A linear layer's method reads its own attribute, an expert layer's that of its config, which all layers share.
    before = {name: vars(method)[name] for name in ("quant_config", _SERIALIZED) if name in vars(method)}
    method.quant_config = copy.copy(method.quant_config)
    setattr(method.quant_config, _SERIALIZED, True)
    setattr(method, _SERIALIZED, True)
    try:
        yield
    finally:
        delattr(method, _SERIALIZED)
        vars(method).update(before)


_SERIALIZED = "is_checkpoint_fp8_serialized"


def _flashinfer_quantizer() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """FlashInfer's MXFP8 quantizer as SGLang calls it for experts: through SGLang's wrapper, or directly.

    The wrapper of 0.5.15 always swizzles scales, even if asked not to; that release's experts do not use it.
    """
    from sglang.srt.layers.quantization import fp8, fp8_utils

    inner = fp8.Fp8MoEMethod._process_mxfp8_moe_weights.__code__.co_consts
    names = [name for code in inner if inspect.iscode(code) for name in code.co_names]
    if "flashinfer_mxfp8_quantize" in names:
        wrapped: Callable[..., tuple[torch.Tensor, torch.Tensor]] = fp8_utils.flashinfer_mxfp8_quantize
        return wrapped
    direct: Callable[..., tuple[torch.Tensor, torch.Tensor]] = importlib.import_module("flashinfer").mxfp8_quantize
    return direct


def _storage(weight: torch.Tensor, scale: torch.Tensor) -> Storage:
    return Storage(weight, scale.view(len(weight), -1))


def _why_converted(layer: Module) -> str | None:
    if getattr(layer.quant_method, "convert_mxfp8_to_block", False):
        return "SGLang converts MXFP8 to block-wise fp8 here (SGLANG_FORCE_MXFP8_BLOCK_CONVERT)"
    return None
