# SPDX-License-Identifier: Apache-2.0
"""Exports of a few tensors, whose trace is given: each matrix goes into a parameter of its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_overlay.core.regions import whole
from sglang_overlay.errors import ExportError
from sglang_overlay.offline import tracing
from sglang_overlay.offline.export.run import export
from sglang_overlay.offline.tracing import Destination, Trace
from sglang_overlay.schemes import block
from sglang_overlay.schemes.choice import parse

BLOCK = parse("block", "--scheme")
PLENTY = 1 << 40


class Stopped(Exception):  # noqa: N818 - reads as what happened
    """An export ends before it is finished."""


class StoppingProgress:
    """Stops an export that writes more bytes of weights than it may."""

    def __init__(self, most):
        self._left = most

    def advance(self, count, /):
        self._left -= count
        if self._left < 0:
            raise Stopped

    def close(self):
        return


@pytest.fixture
def checkpoint_of(tmp_path, monkeypatch):
    """``checkpoint_of(tensors, dtypes)``: its folder. Matrices are loaded into parameters of ``dtypes``."""

    def make(tensors, dtypes=(torch.bfloat16,)):
        matrices = {name: tensor.shape for name, tensor in tensors.items() if tensor.ndim == 2}
        landings = {
            name: [Destination(f"{name}_{dtype}", tuple(shape), dtype, whole(shape)) for dtype in dtypes]
            for name, shape in matrices.items()
        }
        monkeypatch.setattr(tracing, "trace", lambda *_: Trace("Matrices", [], landings))
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def matrix(seed=0):
    return torch.randn(256, 128, generator=torch.Generator().manual_seed(seed))


def exported(source, target):
    export(source, target, BLOCK)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_is_quantized_as_the_parameter_holds_it(dtype, checkpoint_of, tmp_path):
    found = exported(checkpoint_of({"m.weight": matrix()}, [dtype]), tmp_path / "wide")
    expected = exported(checkpoint_of({"m.weight": matrix().to(dtype)}, [dtype]), tmp_path / "cast")
    for name in ("m.weight", "m.weight_scale_inv"):
        assert torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))


def test_tensor_that_is_not_quantized_keeps_its_dtype(checkpoint_of, tmp_path):
    tensors = {"m.weight": matrix(), "norm.weight": matrix()[0].clone(), "steps": torch.arange(3)}
    found = exported(checkpoint_of(tensors), tmp_path / "out")
    for name in ("norm.weight", "steps"):
        assert found[name].dtype == tensors[name].dtype
        assert torch.equal(found[name], tensors[name])


def test_tensor_that_is_loaded_in_two_dtypes_is_refused(checkpoint_of, tmp_path):
    source = checkpoint_of({"m.weight": matrix()}, [torch.bfloat16, torch.float16])
    with pytest.raises(ExportError, match=r"m\.weight goes into .* of dtype torch\.bfloat16 and .* of dtype"):
        export(source, tmp_path / "out", BLOCK)


def test_size_that_the_scheme_does_not_store_is_refused_by_name(checkpoint_of, tmp_path, monkeypatch):
    def refuse(shape):
        raise ValueError(f"{shape[1]} columns are too few")

    monkeypatch.setattr(block, "_blocks", refuse)
    with pytest.raises(ExportError, match=r"m\.weight cannot have scales: 128 columns are too few"):
        export(checkpoint_of({"m.weight": matrix()}), tmp_path / "out", BLOCK)


def test_what_another_export_has_written_meanwhile_is_not_written_again(checkpoint_of, tmp_path):
    source = checkpoint_of({f"{number}.weight": matrix(number) for number in range(3)})
    one_each = matrix().numel()

    def meanwhile(target):
        if not target.exists():
            with pytest.raises(Stopped):
                export(source, target, BLOCK, one_each, progress=lambda _: StoppingProgress(2 * one_each))
        return PLENTY

    made = export(source, tmp_path / "out", BLOCK, one_each, free=meanwhile)
    assert (made.shards, made.resumed) == (3, 1)
