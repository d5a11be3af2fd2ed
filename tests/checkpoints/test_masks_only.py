"""Masks and the name of the dense model restore every bit of a checkpoint, or are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from symprune_lightning import (
    CausalLMModule,
    SymPrune,
    Trainer,
    export_model,
    pack_checkpoint,
    pack_masks,
    prune_model,
    restore_from_masks,
    unpack_checkpoint,
)
from symprune_lightning.checkpoints.packed import folder_size
from symprune_lightning.cli.verify import verify
from tests.callbacks.examples import text_data
from tests.checkpoints.test_packed import contents
from tests.models import build
from tests.trainers import TRAINER

MASKS = "symprune/masks.safetensors"


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def folders(request, tmp_path_factory):
    """A dense model in bfloat16, and the checkpoint pruned from it."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).to(torch.bfloat16).save_pretrained(folder / "dense")
    Trainer(**TRAINER).prune(
        CausalLMModule(str(folder / "dense")),
        datamodule=text_data(),
        output=str(folder / "pruned"),
        callbacks=SymPrune("wanda", sparsity=0.6),
    )
    return folder / "dense", folder / "pruned"


def test_every_bit_is_restored(folders, tmp_path):
    _, pruned = folders
    copy = pack_masks(pruned, tmp_path / "copy")
    assert not list(copy.glob("*.safetensors"))
    assert folder_size(copy) < 0.5 * folder_size(pruned)
    again = restore_from_masks(copy, tmp_path / "again")
    assert contents(again) == contents(pruned)
    assert all(check.passed is not False for check in verify(str(again)))


def test_a_moved_dense_model(folders, tmp_path):
    dense, pruned = folders
    copy = pack_masks(pruned, tmp_path / "copy", str(dense))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in dense.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert contents(restore_from_masks(copy, tmp_path / "again", str(moved))) == contents(pruned)


def test_another_dense_model_is_refused(folders, tmp_path):
    dense, pruned = folders
    copy = pack_masks(pruned, tmp_path / "copy")
    weights = load_file(dense / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name or "w2" in name)
    weights[name][0] += 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((dense / "config.json").read_bytes())
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} of .*, with the masks applied, is not that of"):
        restore_from_masks(copy, tmp_path / "again", str(other))
    assert not (tmp_path / "again").exists()


def test_a_flipped_bit_and_a_truncated_file_are_refused(folders, tmp_path):
    _, pruned = folders
    copy = pack_masks(pruned, tmp_path / "copy")
    data = bytearray((copy / MASKS).read_bytes())
    flipped = bytearray(data)
    flipped[-1] ^= 4
    (copy / MASKS).write_bytes(flipped)
    with pytest.raises(ValueError, match="either the masks are damaged, or this is another model"):
        restore_from_masks(copy, tmp_path / "again")
    (copy / MASKS).write_bytes(data[:-10])
    with pytest.raises(ValueError, match="masks"):
        restore_from_masks(copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_updated_weights_are_refused(folders, tmp_path):
    dense, _ = folders
    model = CausalLMModule(str(dense))
    model.configure_model()
    data = text_data()
    data.setup()
    prune_model(model.model, list(data.calibration_dataloader()), score="ria", update="obsupdate")
    pruned = export_model(model.model, tmp_path / "updated")
    with pytest.raises(ValueError, match="were updated or trained after masking, masks cannot"):
        pack_masks(pruned, tmp_path / "copy", str(dense))
    assert not (tmp_path / "copy").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["updated"]


def test_the_two_kinds_of_copies_name_each_other(folders, tmp_path):
    _, pruned = folders
    with pytest.raises(ValueError, match="restore the checkpoint by `symprune apply --masks"):
        unpack_checkpoint(pack_masks(pruned, tmp_path / "copy"), tmp_path / "again")
    with pytest.raises(ValueError, match="it by `symprune unpack"):
        restore_from_masks(pack_checkpoint(pruned, tmp_path / "packed"), tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=r"has no packed\.json"):
        restore_from_masks(pruned, tmp_path / "again")


def test_a_manifest_that_names_no_model(folders, tmp_path):
    _, pruned = folders
    nameless = tmp_path / "nameless"
    for name, data in contents(pruned).items():
        (nameless / name).parent.mkdir(parents=True, exist_ok=True)
        (nameless / name).write_bytes(data)
    manifest = json.loads((nameless / "sparsity_manifest.json").read_text())
    (nameless / "sparsity_manifest.json").write_text(json.dumps({**manifest, "model": ""}))
    with pytest.raises(ValueError, match="names no model: pass base"):
        pack_masks(nameless, tmp_path / "copy")
