# SPDX-License-Identifier: Apache-2.0
"""Qwen3 dense, each time with one habit that streaming has to cope with."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import ClassVar

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.models.minicpm3 import MiniCPM3ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
from sglang.srt.utils import get_device


def _down_proj(model):
    return model.model.layers[1].mlp.down_proj


class RepackingForCausalLM(Qwen3ForCausalLM):
    """Repacks weights while it is built, as ``pack_params`` of deepseek.py, xverse_moe.py and afmoe.py does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weights = [layer.mlp.down_proj.weight for layer in self.model.layers]
        self.packed = torch._utils._flatten_dense_tensors(weights)
        for weight, part in zip(weights, torch._utils._unflatten_dense_tensors(self.packed, weights), strict=True):
            weight.data = part


class ReadingInInitForCausalLM(Qwen3ForCausalLM):
    """Needs a weight's contents while it is built."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        float(torch.nan_to_num(_down_proj(self).weight.data.float()).sum().item())


class MovingForCausalLM(Qwen3ForCausalLM):
    """Is built in another dtype, and moved then, as ``init_resampler`` of minicpmv.py does with a part."""

    def __init__(self, *args, **kwargs):
        with set_default_torch_dtype(torch.float16):
            super().__init__(*args, **kwargs)
        self.to(device=get_device(), dtype=torch.get_default_dtype())


class LoaderlessForCausalLM(Qwen3ForCausalLM):
    """Takes one parameter's weight loader away, so that the default one is used."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del _down_proj(self).weight._weight_loader


def _load_by_adding(weight):
    original = weight.weight_loader

    def add(param, loaded_weight):
        original(param, torch.zeros_like(loaded_weight))
        param.data.add_(loaded_weight)

    weight._weight_loader = add


class AddingLoaderForCausalLM(Qwen3ForCausalLM):
    """One layer's loader does arithmetic on the parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weight = _down_proj(self).weight

        def add(param, loaded_weight):
            param.data.zero_()
            param.data.add_(loaded_weight)

        weight._weight_loader = add


class FusedAddingLoaderForCausalLM(Qwen3ForCausalLM):
    """The loader of one fused layer does arithmetic on the parameter, before it loads a part of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weight = self.model.layers[1].mlp.gate_up_proj.weight
        original = weight.weight_loader

        def add(param, loaded_weight, shard_id):
            param.data[:1].add_(0)
            original(param, loaded_weight, shard_id)

        weight._weight_loader = add


class LateAddingLoaderForCausalLM(Qwen3ForCausalLM):
    """One layer's loader does arithmetic on the parameter after all of it has been written once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _load_by_adding(_down_proj(self).weight)


class ManyLateAddingLoadersForCausalLM(Qwen3ForCausalLM):
    """Several layers do that."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer in self.model.layers:
            _load_by_adding(layer.mlp.down_proj.weight)


class LateAddingExpertsForCausalLM(Qwen3MoeForCausalLM):
    """Expert layers, but for the first, do that with an expert's down projection."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer in self.model.layers[1:]:
            self._add(layer.mlp.experts.w2_weight)

    @staticmethod
    def _add(weight):
        original = weight.weight_loader

        def add(param, loaded_weight, *args, **kwargs):
            original(param, loaded_weight, *args, **kwargs)
            param.data[:1].add_(0)

        weight.weight_loader = add


class LeavingTensorsWithoutMemoryForCausalLM(Qwen3ForCausalLM):
    """Has a tensor that only describes something."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("described", torch.empty(3, 4, device="meta"), persistent=False)


class FollowingAWeightForCausalLM(LeavingTensorsWithoutMemoryForCausalLM):
    """Has a tensor on the device of a weight, and one without memory."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("cache", torch.zeros(4, device=_down_proj(self).weight.device), persistent=False)


class InMemory(list):
    """Weak references; whoever looks for tensors in here finds how many of them are alive."""

    def __iter__(self):
        gc.collect()
        yield torch.tensor(float(sum(reference() is not None for reference in super().__iter__())))


class WatchedMiniCPM3ForCausalLM(MiniCPM3ForCausalLM):
    """Deletes layers once it has read them, as MiniCPM3 itself does."""

    def load_weights(self, weights):
        self.deleted = InMemory(weakref.ref(layer.self_attn.kv_b_proj.weight) for layer in self.model.layers)
        super().load_weights(weights)


class CustomLoaderForCausalLM(Qwen3ForCausalLM):
    """One layer has a loader of the model's own, as qwen3_5.py and qwen3_next.py give theirs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        weight = _down_proj(self).weight
        original = weight.weight_loader
        weight._weight_loader = lambda param, loaded_weight: original(param, loaded_weight)


class NarrowingForCausalLM(Qwen3ForCausalLM):
    """Cuts this rank's columns out of one layer's weight itself, and gives its loader these alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _down_proj(self).use_presharded_weights = True

    def load_weights(self, weights):
        super().load_weights(map(self._narrowed, weights))

    def _narrowed(self, pair):
        name, weight = pair
        if name.endswith("layers.1.mlp.down_proj.weight"):
            group = parallel_state.get_tp_group()
            return name, weight.chunk(group.world_size, dim=1)[group.rank_in_group]
        return pair


class ReadingAfterLoadingForCausalLM(Qwen3ForCausalLM):
    """Derives a tensor from a quantized layer's weight inside ``load_weights``, under a name nobody knows of."""

    def load_weights(self, weights):
        super().load_weights(weights)
        self.derived = _down_proj(self).weight.data.transpose(0, 1).contiguous()


class ReusedBufferForCausalLM(Qwen3ForCausalLM):
    """Hands its loaders one buffer again and again, as a reader that streams from storage may do."""

    def load_weights(self, weights):
        buffer = torch.empty(1 << 20, dtype=torch.bfloat16)
        super().load_weights((name, buffer[: w.numel()].view(w.shape).copy_(w)) for name, w in weights)


class BypassingForCausalLM(Qwen3ForCausalLM):
    """Writes a weight without calling its loader."""

    def load_weights(self, weights):
        mine = "model.layers.1.mlp.down_proj.weight"
        kept = {}
        super().load_weights((name, tensor) for name, tensor in weights if not self._keep(name == mine, tensor, kept))
        _down_proj(self).weight.data.copy_(kept["weight"])

    @staticmethod
    def _keep(is_mine, tensor, kept):
        if is_mine:
            kept["weight"] = tensor
        return is_mine


class BypassingInSlicesForCausalLM(Qwen3ForCausalLM):
    """Writes slices of all layers' weights without calling their loaders, as kimi_k3.py does, some from a thread."""

    def load_weights(self, weights):
        parts = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
        rows = [self.model.layers[0].self_attn.q_size, *[self.model.layers[0].self_attn.kv_size] * 2]
        params = dict(self.named_parameters())
        left = []
        for name, tensor in weights:
            part = next((part for part in parts if part in name), None)
            if part is None or not name.endswith("weight"):
                left.append((name, tensor))
                continue
            fused, number = parts[part]
            start = sum(rows[:number])
            view = params[name.replace(part, fused)].data[start : start + rows[number]]
            thread = threading.Thread(target=view.copy_, args=(tensor,))
            thread.start()
            thread.join()
        super().load_weights(left)


class ScalingForCausalLM(Qwen3ForCausalLM):
    """Scales a weight after it has been loaded."""

    def load_weights(self, weights):
        super().load_weights(weights)
        _down_proj(self).weight.data.mul_(0.5)


class ReplacingDataForCausalLM(Qwen3ForCausalLM):
    """Gives a parameter other memory in place of loading it."""

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "model.layers.1.mlp.down_proj.weight":
                _down_proj(self).weight.data = tensor.clone()
            else:
                super().load_weights([(name, tensor)])


class ReplacingParameterForCausalLM(Qwen3ForCausalLM):
    """Replaces a parameter in place of loading it."""

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "model.layers.1.mlp.down_proj.weight":
                _down_proj(self).weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
            else:
                super().load_weights([(name, tensor)])


class CopyingAfterLoadingForCausalLM(Qwen3ForCausalLM):
    """Copies a weight into memory of its own after it has been loaded."""

    def load_weights(self, weights):
        super().load_weights(weights)
        weight = _down_proj(self).weight
        self.copied = torch.empty(weight.shape, dtype=weight.dtype)
        self.copied.copy_(weight.data)


class CountingAfterLoadingForCausalLM(Qwen3ForCausalLM):
    """Computes a number from a weight after it has been loaded."""

    def load_weights(self, weights):
        super().load_weights(weights)
        self.largest = torch.tensor(_down_proj(self).weight.abs().max().item())


class CopyingWhatIsDerivedForCausalLM(Qwen3ForCausalLM):
    """Copies what it has computed from a weight."""

    def load_weights(self, weights):
        super().load_weights(weights)
        self.squares = torch.empty(_down_proj(self).weight.shape)
        self.squares.copy_(_down_proj(self).weight.float() ** 2)


class MergingForCausalLM(Qwen3ForCausalLM):
    """Joins weights when they have been loaded, and makes them views of that, as ``kimi_k3.py`` does."""

    def load_weights(self, weights):
        super().load_weights(weights)
        mlp = self.model.layers[1].mlp
        self.merged = torch.cat([mlp.gate_up_proj.weight.data, mlp.down_proj.weight.data.t()])
        mlp.gate_up_proj.weight.data = self.merged[: len(mlp.gate_up_proj.weight)]


class KeepingForCausalLM(Qwen3ForCausalLM):
    """Keeps a weight under another name when it has been loaded, as ``kimi_k3.py`` does with ``f_b_proj``."""

    def load_weights(self, weights):
        super().load_weights(weights)
        self.kept = _down_proj(self).weight.data.contiguous()


class FailingAfterLoadingForCausalLM(Qwen3ForCausalLM):
    """Needs a weight's contents, and does not like them."""

    def load_weights(self, weights):
        super().load_weights(weights)
        if _down_proj(self).weight.float().sum().isfinite().item():
            raise RuntimeError("the sum is 0")


class _Watched:
    """Counts the layers with parameters of earlier models that are in memory when it is built."""

    _layers: ClassVar[list] = []

    def __init__(self, *args, **kwargs):
        earlier = sum(layer() is not None for layer in self._layers)
        super().__init__(*args, **kwargs)
        self.earlier = torch.tensor(float(earlier))

    def load_weights(self, weights):
        self._layers[:] = [weakref.ref(layer) for layer in self.modules() if layer._parameters]
        super().load_weights(weights)


class LateAndWatchedForCausalLM(_Watched, LateAddingLoaderForCausalLM):
    """Is loaded anew since one layer cannot be streamed."""


class ConvertingAndWatchedForCausalLM(_Watched, Qwen3ForCausalLM):
    """Is loaded anew since an error ends its load: it converts what it computes from a weight to numpy."""

    def load_weights(self, weights):
        super().load_weights(weights)
        self.largest = torch.tensor(_down_proj(self).weight.float().abs().numpy().max())


class NotingExpertsForCausalLM(Qwen3MoeForCausalLM):
    """Notes the experts' weights down before they are quantized, as bailing_moe.py and sarvam_moe.py do."""

    def load_weights(self, weights):
        self.routed_experts_weights_of_layer = None
        super().load_weights(weights)
        self.routed_experts_weights_of_layer = {
            number: layer.mlp.get_moe_weights() for number, layer in enumerate(self.model.layers)
        }


class StallingForCausalLM(Qwen3ForCausalLM):
    """Stops in the middle of loading: says so in the file that ``STALLING_MARKER`` names, with its process number."""

    def load_weights(self, weights):
        super().load_weights(self._stalling(weights))

    @staticmethod
    def _stalling(weights):
        for number, pair in enumerate(weights):
            if number == 12:
                marker = Path(os.environ["STALLING_MARKER"])
                marker.with_suffix(".part").write_text(str(os.getpid()))
                marker.with_suffix(".part").rename(marker)
                time.sleep(600)
            yield pair


EntryClass = [
    RepackingForCausalLM,
    ReadingInInitForCausalLM,
    MovingForCausalLM,
    LoaderlessForCausalLM,
    AddingLoaderForCausalLM,
    FusedAddingLoaderForCausalLM,
    LateAddingLoaderForCausalLM,
    ManyLateAddingLoadersForCausalLM,
    LateAddingExpertsForCausalLM,
    LeavingTensorsWithoutMemoryForCausalLM,
    FollowingAWeightForCausalLM,
    LateAndWatchedForCausalLM,
    ConvertingAndWatchedForCausalLM,
    WatchedMiniCPM3ForCausalLM,
    CustomLoaderForCausalLM,
    NarrowingForCausalLM,
    ReadingAfterLoadingForCausalLM,
    ReusedBufferForCausalLM,
    BypassingForCausalLM,
    BypassingInSlicesForCausalLM,
    ScalingForCausalLM,
    ReplacingDataForCausalLM,
    ReplacingParameterForCausalLM,
    CopyingAfterLoadingForCausalLM,
    CountingAfterLoadingForCausalLM,
    CopyingWhatIsDerivedForCausalLM,
    MergingForCausalLM,
    KeepingForCausalLM,
    FailingAfterLoadingForCausalLM,
    NotingExpertsForCausalLM,
    StallingForCausalLM,
]
