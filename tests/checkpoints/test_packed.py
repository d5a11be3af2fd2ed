"""Packed copies restore every bit, and damaged ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from symprune_lightning import (
    CausalLMModule,
    SymPrune,
    Trainer,
    load_masks,
    pack_checkpoint,
    unpack_checkpoint,
)
from symprune_lightning.checkpoints.packed import folder_size
from symprune_lightning.cli.verify import verify
from tests.callbacks.examples import text_data
from tests.models import build
from tests.trainers import TRAINER

MASKS = "symprune/masks.safetensors"
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def sparse(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape) * 10 + 20
    return values.masked_fill(torch.rand(shape) < sparsity, 0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_every_bit_is_restored(tmp_path, dtype, sparsity):
    shapes = {"a.weight": (7, 13), "b": (3,), "experts": (2, 5, 9), "scalar": (), "none": (0, 4)}
    tensors = {name: sparse(shape, sparsity, dtype) for name, shape in shapes.items()}
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "dense")


def test_negative_zeros_and_nan_are_restored(tmp_path):
    weight = torch.zeros(8, 8)
    weight[0, 0], weight[1, 1], weight[2, 2] = -0.0, float("nan"), float("inf")
    save_file({"w": weight}, tmp_path / "model.safetensors")
    pack_checkpoint(tmp_path, tmp_path.with_name("packed"))
    again = unpack_checkpoint(tmp_path.with_name("packed"), tmp_path.with_name("again"))
    restored = load_file(again / "model.safetensors")["w"]
    assert torch.equal(restored.view(torch.int32), weight.view(torch.int32))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "pruned"
    module = CausalLMModule(build(request.param).to(torch.bfloat16))
    options = {"pattern": "2:4"} if request.param == "llama" else {"sparsity": 0.6}
    Trainer(**TRAINER).prune(
        module, datamodule=text_data(), output=str(folder), callbacks=SymPrune("wanda", **options)
    )
    return folder


def test_a_pruned_checkpoint(checkpoint, tmp_path):
    packed = pack_checkpoint(checkpoint, tmp_path / "packed")
    again = unpack_checkpoint(packed, tmp_path / "again")
    before, after = contents(checkpoint), contents(again)
    # safetensors writes the entries of metadata in any order
    before.pop(MASKS), after.pop(MASKS)
    assert before == after
    masks, restored = load_masks(checkpoint), load_masks(again)
    assert list(masks) == list(restored)
    assert all(torch.equal(mask, restored[name]) for name, mask in masks.items())
    assert all(check.passed is not False for check in verify(str(again)))
    assert folder_size(packed) < folder_size(checkpoint)
    # the same call replaces the copy
    assert set(contents(pack_checkpoint(checkpoint, tmp_path / "packed"))) == set(contents(packed))


def test_a_flipped_bit(checkpoint, tmp_path):
    packed = pack_checkpoint(checkpoint, tmp_path / "packed")
    file = packed / "model.safetensors"
    data = bytearray(file.read_bytes())
    for position in (len(data) - 1, len(data) // 2):
        flipped = bytearray(data)
        flipped[position] ^= 4
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"the packed copy .*model.safetensors is damaged"):
            unpack_checkpoint(packed, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_a_truncated_file(checkpoint, tmp_path):
    packed = pack_checkpoint(checkpoint, tmp_path / "packed")
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        unpack_checkpoint(packed, tmp_path / "again")
    file.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        unpack_checkpoint(packed, tmp_path / "again")


def test_folders_that_are_no_packed_copy(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no packed.json: pass a folder of"):
        unpack_checkpoint(checkpoint, tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="neither"):
        pack_checkpoint(tmp_path, tmp_path / "packed")
    packed = pack_checkpoint(checkpoint, tmp_path / "packed")
    info = json.loads((packed / "packed.json").read_text())
    (packed / "packed.json").write_text(json.dumps({**info, "format_version": 2}))
    with pytest.raises(ValueError, match="has packed format 2, and this version reads format 1"):
        unpack_checkpoint(packed, tmp_path / "again")


def test_a_copy_does_not_replace_its_source_nor_write_elsewhere(checkpoint, tmp_path):
    with pytest.raises(FileExistsError, match="would replace itself: write to another folder"):
        pack_checkpoint(checkpoint, checkpoint)
    packed = pack_checkpoint(checkpoint, tmp_path / "packed")
    text = (packed / "packed.json").read_text()
    (packed / "packed.json").write_text(text.replace("model.safetensors", "../x.safetensors"))
    with pytest.raises(ValueError, match=r"is damaged: tensor .* is in ../x.safetensors, outside"):
        unpack_checkpoint(packed, tmp_path / "again")


def test_a_truncated_checkpoint_is_named(checkpoint, tmp_path):
    cut = shutil.copytree(checkpoint, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        pack_checkpoint(tmp_path / "cut", tmp_path / "packed")
