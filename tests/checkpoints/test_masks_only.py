"""Masks and the name of the dense model restore every bit of a checkpoint, or are refused."""

from __future__ import annotations

import json
import shutil

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
from tests.checkpoints.test_packed import MASKS, contents
from tests.models import build
from tests.trainers import TRAINER


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
    nameless = shutil.copytree(pruned, tmp_path / "nameless")
    manifest = json.loads((nameless / "sparsity_manifest.json").read_text())
    (nameless / "sparsity_manifest.json").write_text(json.dumps({**manifest, "model": ""}))
    with pytest.raises(ValueError, match="names no model: pass --base"):
        pack_masks(nameless, tmp_path / "copy")


def test_tensors_of_several_dtypes_and_files(folders, tmp_path):
    """Streaming keeps the dtype of each tensor, and writes a file for each block."""
    dense, pruned = folders
    mixed = shutil.copytree(pruned, tmp_path / "mixed")
    weights = load_file(pruned / "model.safetensors")
    (mixed / "model.safetensors").unlink()
    norms = {name: weight.float() for name, weight in weights.items() if "norm" in name}
    others = {name: weight for name, weight in weights.items() if name not in norms}
    save_file(norms, mixed / "a.safetensors", metadata={"format": "pt"})
    save_file(others, mixed / "b.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(norms, "a.safetensors") | dict.fromkeys(others, "b.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (mixed / "model.safetensors.index.json").write_text(json.dumps(index))
    again = restore_from_masks(pack_masks(mixed, tmp_path / "copy", str(dense)), tmp_path / "again")
    assert contents(again) == contents(mixed)


def test_a_tensor_that_the_dense_model_does_not_have(folders, tmp_path):
    dense, pruned = folders
    other = shutil.copytree(pruned, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        {**weights, "old.inv_freq": torch.ones(3)},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"is saved without a tensor old\.inv_freq, which"):
        pack_masks(other, tmp_path / "copy", str(dense))


def test_a_base_that_is_missing_the_checkpoint_itself_or_not_trusted(folders, tmp_path):
    dense, pruned = folders
    with pytest.raises(ValueError, match="is the pruned checkpoint itself"):
        pack_masks(pruned, tmp_path / "copy", str(pruned))
    copy = pack_masks(pruned, tmp_path / "copy")
    with pytest.raises(OSError, match="cannot be loaded; pass it"):
        restore_from_masks(copy, tmp_path / "again", str(tmp_path / "nowhere") + "/")
    with pytest.raises(ValueError, match=r"would run code of .*: pass the model that you trust"):
        restore_from_masks(copy, tmp_path / "again", trust_remote_code=True)
    again = restore_from_masks(copy, tmp_path / "again", str(dense), trust_remote_code=True)
    assert contents(again) == contents(pruned)


@pytest.mark.parametrize("text", ["[]", "{}", '{"tensors": {"a": {}}, "format_version": 1}', "{"])
def test_damaged_information(folders, tmp_path, text):
    _, pruned = folders
    copy = pack_masks(pruned, tmp_path / "copy")
    (copy / "packed.json").write_text(text)
    with pytest.raises(ValueError, match=r"packed\.json is damaged"):
        restore_from_masks(copy, tmp_path / "again")


def test_an_index_that_names_files_elsewhere(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index = {"weight_map": {"x": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"tensor x is in .*, outside the folder"):
        pack_checkpoint(folder, tmp_path / "packed")


def test_a_recorded_update_is_named(folders, tmp_path):
    dense, _ = folders
    options = {"sparsity": 0.5, "update": "maskedcg"}
    Trainer(**TRAINER).prune(
        CausalLMModule(str(dense)),
        datamodule=text_data(),
        output=str(tmp_path / "pruned"),
        callbacks=SymPrune("wanda", **options),
    )
    with pytest.raises(ValueError, match="MaskedCG changed the kept weights of"):
        pack_masks(tmp_path / "pruned", tmp_path / "copy")


def test_the_checkpoint_itself_is_no_dense_model(folders, tmp_path, monkeypatch):
    _, pruned = folders
    monkeypatch.chdir(pruned.parent)
    (tmp_path / "link").symlink_to(pruned)
    for base in ("pruned", "./pruned", str(tmp_path / "link")):
        with pytest.raises(ValueError, match="is the pruned checkpoint itself"):
            pack_masks(pruned, tmp_path / "copy", base)
