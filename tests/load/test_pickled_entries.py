# SPDX-License-Identifier: Apache-2.0
"""What ``torch.save`` stores beside plain contiguous tensors: whatever stock loads from it, streaming loads as well."""

from __future__ import annotations

import pytest
import torch
from harness.mutations import pickled
from harness.streamed import assert_streamed, warnings_of
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadFailed, compare
from workbench.loads.updates import Update

pytestmark = pytest.mark.every_release

LAYER = "model.layers.1"
ATTENTION = f"{LAYER}.self_attn"
O_PROJ = f"{ATTENTION}.o_proj.weight"


def none(entries):
    """Beside weights, and under the names of modules and of parameters that Qwen3 does not have."""
    entries["model.layers.0.self_attn.rotary_emb.inv_freq"] = None
    entries["extra"] = None


def numbers(entries):
    entries.update({"epoch": 3, "loss": 0.5, "done": True})


def text(entries):
    entries.update({"format": "pt", "version": b"1"})


def containers(entries):
    entries.update({"config": {"hidden_size": 256, "nested": {"deep": torch.ones(2)}}, "list": [1, torch.ones(2)]})


def sparse(entries):
    entries["mask"] = torch.eye(4).to_sparse()
    entries["mask_rows"] = torch.eye(4).to_sparse_csr()


def of_other_dtypes(entries):
    entries["steps"] = torch.arange(4)
    entries["flags"] = torch.ones(4, dtype=torch.bool)
    entries["phases"] = torch.ones(4, dtype=torch.complex64)


def quantized(entries):
    entries["packed"] = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


def without_data(entries):
    entries["unfilled"] = torch.empty(4, 4, device="meta")
    entries["empty"] = torch.empty(0)
    entries["scalar"] = torch.tensor(1.0)


def nested(entries):
    entries["ragged"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


STRANGE = [none, numbers, text, containers, sparse, of_other_dtypes, quantized, without_data, nested]


def negative(entries):
    for name in (O_PROJ, f"{ATTENTION}.k_proj.weight", f"{LAYER}.mlp.up_proj.weight", "model.norm.weight"):
        entries[name] = torch._neg_view(entries[name])


def negative_and_strided(entries):
    for name in (O_PROJ, f"{LAYER}.mlp.gate_proj.weight"):
        entries[name] = torch._neg_view(entries[name].t().contiguous()).t()


def imaginary_part_of_a_conjugate(entries):
    parts = torch.view_as_complex(torch.stack([torch.zeros(256, 256), entries[O_PROJ].float()], -1))
    entries[O_PROJ] = parts.conj().imag
    assert entries[O_PROJ].is_neg()


def transposed(entries):
    entries.update({name: value.t().contiguous().t() for name, value in entries.items() if value.dim() == 2})


def every_other_column(entries):
    entries.update(
        {name: value.repeat_interleave(2, -1)[:, ::2] for name, value in entries.items() if value.dim() == 2}
    )


def expanded(entries):
    entries[O_PROJ] = entries[O_PROJ][:1].expand(256, 256)
    entries[f"{ATTENTION}.q_proj.weight"] = entries[f"{ATTENTION}.q_proj.weight"][:, :1].expand(256, 256)
    entries[f"{LAYER}.mlp.down_proj.weight"] = torch.full((), 0.5).bfloat16().expand(256, 384)


def in_one_storage(entries):
    names = [f"{ATTENTION}.{part}_proj.weight" for part in "qkv"]
    fused = torch.cat([entries[name] for name in names])
    entries.update(zip(names, fused.split([len(entries[name]) for name in names]), strict=True))
    both = torch.stack([entries[f"{LAYER}.mlp.{part}_proj.weight"] for part in ("gate", "up")], 1)
    entries.update({f"{LAYER}.mlp.gate_proj.weight": both[:, 0], f"{LAYER}.mlp.up_proj.weight": both[:, 1]})


def parameters(entries):
    entries.update({name: torch.nn.Parameter(value) for name, value in entries.items()})


VIEWS = [
    negative,
    negative_and_strided,
    imaginary_part_of_a_conjugate,
    transposed,
    every_other_column,
    expanded,
    in_one_storage,
    parameters,
]


def named(changes):
    return [pytest.param(change, id=change.__name__.replace("_", " ")) for change in changes]


@pytest.fixture
def changed(checkpoint, tmp_path):
    return lambda change, family="qwen3", **fields: pickled(checkpoint(family), tmp_path / "changed", change, **fields)


@pytest.mark.parametrize("change", named([*STRANGE, *VIEWS]))
def test_whatever_stock_loads_is_loaded_as_stock(change, both, changed):
    stock, result, reports = both(changed(change))
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_and_loader_threads_take_them_too(family, both, changed):
    def change(entries):
        for name in list(entries):
            if "experts.3." in name or "o_proj" in name:
                entries[name] = torch._neg_view(entries[name])
        for strange in STRANGE:
            strange(entries)

    stock, result, reports = both(changed(change, family))
    assert compare(stock, result) == []
    assert_streamed(reports)


def test_pt_files_are_as_bin_files(both, changed):
    def change(entries):
        none(entries)
        sparse(entries)
        negative(entries)

    stock, result, reports = both(changed(change, suffix="pt"), server_args={"load_format": "pt"})
    assert compare(stock, result) == []
    assert_streamed(reports)


def test_each_tensor_of_a_shared_storage_is_told_by_its_own_name(workers, changed):
    def change(entries):
        in_one_storage(entries)
        entries[f"{LAYER}.mlp.up_proj.weight"][1] = torch.nan

    result = workers.load(LoadJob(changed(change)))
    (warning,) = warnings_of(result)
    assert f"loaded from {LAYER}.mlp.gate_proj.weight, {LAYER}.mlp.up_proj.weight." in warning


@pytest.mark.parametrize("changes", [STRANGE, VIEWS], ids=["strange", "views"])
def test_update_from_disk_ends_as_a_fresh_load(changes, workers, checkpoint, changed):
    path = changed(lambda entries: [change(entries) for change in changes] and None)
    fresh = workers.load(LoadJob(path, streaming="require"))
    result = workers.load(LoadJob(checkpoint("qwen3", seed=1), streaming="require", updates=(Update("disk", path),)))
    (done,) = result.ranks[0].updates
    assert done.success, done.message
    assert compare(fresh, result) == []
    assert warnings_of(result) == []


def test_entries_beside_weights_that_wait_for_each_other_are_not_kept(workers, checkpoint, changed):
    """A model that joins two weights itself gets both in one call of an update; what is no tensor has no other half."""

    def notes(entries):
        for name in [name for name in entries if ".q_a_proj." in name]:
            entries[name.replace(".weight", ".note")] = "no tensor"

    path = changed(notes, "deepseek_v3")
    assert any("note" in name for file in path.glob("*.bin") for name in torch.load(file, weights_only=True))
    old = checkpoint("deepseek_v3", seed=1)
    result = workers.load(LoadJob(old, streaming="require", updates=(Update("disk", path),)))
    (done,) = result.ranks[0].updates
    assert done.success, done.message
    assert compare(workers.load(LoadJob(path, streaming="require")), result) == []


REFUSED = {
    "none": lambda: None,
    "number": lambda: 1.5,
    "sparse": lambda: torch.eye(256).to_sparse(),
    "dict": lambda: {"weight": torch.ones(256, 256)},
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(256, 256), 0.1, 0, torch.qint8),
    "bool": lambda: torch.ones(256, 256, dtype=torch.bool),
    "expanded integer": lambda: torch.ones((), dtype=torch.int8).expand(256, 256),
    "complex": lambda: torch.ones(256, 256, dtype=torch.complex64),
    "without data": lambda: torch.empty(256, 256, device="meta"),
}


@pytest.mark.parametrize("value", REFUSED)
def test_what_stands_in_the_place_of_a_weight_is_an_error_that_names_it(value, workers, changed):
    with pytest.raises(LoadFailed) as failure:
        workers.load(LoadJob(changed(lambda entries: entries.update({O_PROJ: REFUSED[value]()}))))
    assert O_PROJ in str(failure.value)
