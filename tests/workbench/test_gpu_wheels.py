# SPDX-License-Identifier: Apache-2.0
"""What is collected for a machine without a package index, what is dropped of it, and that the result is whole."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import pytest
from workbench.gpu import gpu_modules, gpu_wheels, pieces
from workbench.gpu.gpu_wheels import Wanted
from workbench.releases import environment
from workbench.releases.environment import EnvironmentSetupError


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_python_files_are_kept_and_kernels_of_one_generation(tmp_path):
    kept = {
        "sgl_kernel/__init__.py",
        "sgl_kernel/sm90/common_ops.abi3.so",
        "sglang/srt/server/__init__.py",
        "xgrammar/libxgrammar_bindings.so",
        "sglang-0.5.17.dist-info/METADATA",
    }
    dropped = (
        "bin/huggingface-cli",
        "sgl_kernel/flash_ops.abi3.so",
        "sgl_kernel/sm100/common_ops.abi3.so",
        "sglang/srt/server/_core.cpython-312-x86_64-linux-gnu.so",
        "sglang/multimodal_gen/a/b.py",
        "xgrammar/lib/libxgrammar.a",
    )
    gpu_wheels.drop(files(tmp_path, *kept, *dropped))
    assert names_in(tmp_path) == kept


def test_of_the_newest_release_only_its_row_quantizer_is_taken(tmp_path):
    kernels = "sglang/kernels/jit"
    with zipfile.ZipFile(tmp_path / "sglang.whl", "w") as archive:
        archive.mkdir(f"{kernels}/include")
        for name in ("csrc/gemm/per_token_quant_fp8.cuh", "csrc/gemm/other.cuh", "include/sgl_kernel/vec.cuh"):
            archive.writestr(f"{kernels}/{name}", "")
        gpu_wheels.extract_row_sources(archive, tmp_path / "out")
    assert names_in(tmp_path / "out") == {"csrc/gemm/per_token_quant_fp8.cuh", "include/sgl_kernel/vec.cuh"}


def wanted(release: str) -> Wanted:
    plan = dataclasses.replace(environment.planned(release, "gpu"), clone=environment.CLONE)
    return Wanted(plan, "3.12")


@pytest.mark.parametrize("release", environment.supported())
def test_no_release_asks_for_what_the_machine_has(release):
    asked = {environment.normalized(row["name"]) for row in gpu_wheels._ROW.finditer(wanted(release).requirements)}
    assert {"sglang", "sglang-kernel", "transformers", "tokenizers", "xgrammar", "apache-tvm-ffi"} <= asked
    assert not asked & {"torch", "torchvision", "triton", "nvidia-cublas", "flash-attn-4", "scipy", "numpy", "pillow"}


def test_release_is_the_newest_that_is_made_for_the_machines_torch():
    assert gpu_wheels.release_for("2.11.0+cu130") == "0.5.17"
    with pytest.raises(EnvironmentSetupError, match=r"made for torch 1\.0; there are: 2\.11\.0,"):
        gpu_wheels.release_for("1.0")


def test_what_is_collected_is_packed_with_what_it_is_for(tmp_path, monkeypatch):
    def pip(_: Wanted, *command: str, listed: str) -> None:
        if command[0] == "install":
            files(Path(command[command.index("--target") + 1]), "sglang/a.py", "sgl_kernel/flash_ops.so")
        else:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "sglang-0.5.23-py3-none-any.whl", "w") as archive:
                archive.writestr("sglang/kernels/jit/include/a.cuh", "")
            assert [row["name"] for row in gpu_wheels._ROW.finditer(listed)] == ["sglang"]

    monkeypatch.setattr(gpu_wheels, "_pip", pip)
    monkeypatch.setattr(gpu_wheels.shutil, "which", lambda _: None)
    manifest = gpu_wheels.collect(wanted("0.5.17"), tmp_path / "out", 200)
    facts = manifest.facts
    assert (facts["release"], facts["python"], facts["torch"], facts["compiled"]) == ("0.5.17", "3.12", "2.11.0", 0)
    assert {"torch", "tilelang", "scipy"} <= set(facts["left_out"])
    pieces.unpack(tmp_path / "out", tmp_path / "unpacked")
    assert names_in(tmp_path / "unpacked") == {"site/sglang/a.py", f"{gpu_modules.ROW_KERNELS}/include/a.cuh"}
    assert len(manifest.pieces) > 1
    assert "for Python 3.12" in next(iter(gpu_wheels.described(manifest)))


def test_every_kernel_that_is_compiled_ahead_is_named_once():
    assert len(set(gpu_modules.MODULES)) == len(gpu_modules.MODULES)


def test_a_module_that_cannot_be_loaded_is_told_of_and_the_others_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu_modules.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(gpu_modules, "MODULES", (("one", "load", ()), ("two", "load", ("bfloat16",))))
    monkeypatch.setattr(gpu_modules, "_loaded", lambda where, *_: {"two": 2}[where])
    first, second = gpu_modules.build_all(None)
    assert first.error == "KeyError: 'one'"
    assert (second.name, second.error) == ("two:load('bfloat16',)", "")


def test_a_folder_that_is_there_is_not_overwritten(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_wheels.main(["--out", str(tmp_path)])
    assert "is there already" in capsys.readouterr().err


def test_failure_leaves_no_half_folder(tmp_path, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise EnvironmentSetupError("no index")

    monkeypatch.setattr(gpu_wheels, "_pip", fail)
    assert gpu_wheels.main(["--out", str(tmp_path / "out")]) == 1
    assert "no index" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
