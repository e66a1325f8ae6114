"""Fingerprints see every way in which two tensors of equal names can differ, and every tensor a model holds."""

from __future__ import annotations

import torch
from workbench.loads.fingerprints import fingerprint, model_bytes, model_prints, named_tensors


class Attention(torch.nn.Module):
    """Holds tensors in all the places SGLang's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        self.register_buffer("cache", torch.ones(2))
        self.w_kc = self.weight.detach()[:2].t()
        self.parts = [torch.zeros(1), (torch.ones(1), "no tensor")]
        self.by_name = {"scale": torch.ones(3)}
        self.w_scale = None


def test_parameters_buffers_and_attributes_are_found_at_any_depth() -> None:
    model = torch.nn.Sequential(Attention())
    assert [(kind, name) for kind, name, _ in named_tensors(model)] == [
        ("parameter", "0.weight"),
        ("buffer", "0.cache"),
        ("attribute", "0.w_kc"),
        ("attribute", "0.parts[0]"),
        ("attribute", "0.parts[1][0]"),
        ("attribute", "0.by_name['scale']"),
    ]
    assert list(model_prints(model)) == [name for _, name, _ in named_tensors(model)]


def test_one_flipped_bit_changes_the_print() -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    flipped = weight.clone()
    flipped.view(torch.uint8)[3, 3] ^= 1
    assert fingerprint("parameter", weight) != fingerprint("parameter", flipped)


def test_nan_payloads_and_signed_zeros_are_bytes_too() -> None:
    assert fingerprint("buffer", torch.tensor([0.0])) != fingerprint("buffer", torch.tensor([-0.0]))


def test_a_transposed_view_of_equal_values_differs_in_stride_alone() -> None:
    plain = torch.arange(6.0).view(2, 3)
    columns_first = plain.t().contiguous().t()
    one, other = fingerprint("parameter", plain), fingerprint("parameter", columns_first)
    assert one.sha256 == other.sha256
    assert (one.stride, other.stride) == ((3, 1), (1, 2))


def test_storages_shared_between_tensors_count_once() -> None:
    assert model_bytes(Attention()) == 4 * (12 + 2 + 1 + 1 + 3)


def test_a_meta_tensor_has_a_print_of_its_own() -> None:
    print_ = fingerprint("parameter", torch.empty(2, device="meta"))
    assert (print_.device, print_.sha256) == ("meta", "meta")
