# SPDX-License-Identifier: Apache-2.0
"""Show a model to its loaders as they expect it while an update loads weights: with placeholders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.placeholders import set_loader
from sglang_overlay.load.snapshots import NOTED
from sglang_overlay.load.updatable_layer import UpdatableLayer

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader


@contextmanager
def layers_shown(layers: Iterable[UpdatableLayer], wrap: Callable[[str, WeightLoader], WeightLoader]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.shown(wrap))
        yield


@contextmanager
def aliases_shown(
    model: torch.nn.Module, layers: Iterable[UpdatableLayer], wrappers: Mapping[torch.nn.Module, UpdatableLayer]
) -> Iterator[None]:
    """Show a layer's placeholders in all other places where models look for its weights.

    LoRA's wrappers of linear layers register the layer's weights again. Those of experts do not, so upstream's models
    look for ``experts.w13_weight`` although it is ``experts.base_layer.w13_weight``, and silently skip it.
    """
    shown: dict[int, dict[str, torch.nn.Parameter]] = {}
    own = {layer.module for layer in layers}
    for layer in layers:
        for key, placeholder in {**layer.placeholders, **layer.companions}.items():
            served = layer.module._parameters.get(key)
            if served is not None:
                scales = dict([layer.scales[key]] if key in layer.scales else [])
                shown[id(served)] = {"": placeholder, **scales}
    changed = []
    for module, layer in wrappers.items():
        changed.append((module, module._parameters))
        module._parameters = {**module._parameters, **layer.placeholders, **dict(layer.scales.values())}
    for module in model.modules():
        aliases = [key for key, weight in module._parameters.items() if id(weight) in shown and module not in own]
        if aliases:
            before = module._parameters
            module._parameters = dict(before)
            for key in aliases:
                (placeholder, *_), scales = shown[id(before[key])].values(), dict(shown[id(before[key])])
                module._parameters[key] = placeholder
                module._parameters.update({name: scale for name, scale in scales.items() if name})
            changed.append((module, before))
    try:
        yield
    finally:
        for module, before in changed:
            module._parameters = before


def wrapped_layers(
    model: torch.nn.Module, layers: Iterable[UpdatableLayer]
) -> Iterator[tuple[torch.nn.Module, UpdatableLayer]]:
    """LoRA's modules around expert layers, each with the layer that it wraps."""
    own: dict[torch.nn.Module | None, UpdatableLayer] = {layer.module: layer for layer in layers}
    for module in model.modules():
        layer = own.get(module._modules.get("base_layer"))
        if layer is not None and not layer.placeholders.keys() & module._parameters.keys():
            yield module, layer


@contextmanager
def loaders_wrapped(model: torch.nn.Module, wrap: Callable[[str, WeightLoader], WeightLoader]) -> Iterator[None]:
    """Wrap the loaders of all parameters with memory: models call them from threads, where no mode is active."""
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    before = []
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            loader = getattr(parameter, "weight_loader", None)
            set_loader(parameter, wrap(name, loader or default_weight_loader))
            before.append((parameter, loader))
    try:
        yield
    finally:
        for parameter, loader in before:
            if loader is None:
                del parameter.weight_loader  # type: ignore[attr-defined]
            else:
                set_loader(parameter, loader)


@contextmanager
def notes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restore models' snapshots of parameters afterwards: new ones would hold placeholders."""
    before = {
        module: {name: vars(module)[name] for name in NOTED if name in vars(module)} for module in model.modules()
    }
    try:
        yield
    finally:
        for module, noted in before.items():
            for name in NOTED:
                vars(module).pop(name, None)
            vars(module).update(noted)


@contextmanager
def load_weights_given(model: torch.nn.Module, change: Callable[[Any], AbstractContextManager[Any]]) -> Iterator[None]:
    """Make ``model.load_weights`` load what ``change(weights)`` yields, inside that context."""
    attributes: dict[str, Any] = vars(model)
    own, original = attributes.get("load_weights"), model.load_weights

    @functools.wraps(original)  # type: ignore[arg-type]
    def load_weights(weights: Any, *args: Any, **kwargs: Any) -> Any:
        with change(weights) as changed:
            return original(changed, *args, **kwargs)  # type: ignore[operator]

    attributes["load_weights"] = load_weights
    try:
        yield
    finally:
        del attributes["load_weights"]
        if own is not None:
            attributes["load_weights"] = own
