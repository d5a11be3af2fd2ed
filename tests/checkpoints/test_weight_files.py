from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from symprune_lightning.checkpoints import weight_files
from symprune_lightning.checkpoints.weight_files import copy_tensor

TENSORS = {
    "a": torch.randn(37, 5),
    "b": torch.randn(64).to(torch.bfloat16),
    "c.weight": torch.randint(0, 255, (3, 3, 3), dtype=torch.uint8),
    "d": torch.randn(16).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("name", TENSORS)
def test_copies_are_equal(name, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "BYTES_AT_ONCE", 64)
    save_file(TENSORS, tmp_path / "all.safetensors", metadata={"format": "pt", "other": "x"})
    copy_tensor(tmp_path / "all.safetensors", name, tmp_path / "one.safetensors")
    copied = load_file(tmp_path / "one.safetensors")
    assert list(copied) == [name]
    assert copied[name].dtype == TENSORS[name].dtype
    assert copied[name].shape == TENSORS[name].shape
    bits = [x.flatten().view(torch.uint8) for x in (copied[name], TENSORS[name])]
    assert torch.equal(*bits)
    with safe_open(tmp_path / "one.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_truncated_file_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "all.safetensors")
    content = (tmp_path / "all.safetensors").read_bytes()
    (tmp_path / "all.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"all\.safetensors is damaged or truncated"):
        copy_tensor(tmp_path / "all.safetensors", "a", tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_a_single_file_is_read_in_place_of_an_old_index(tmp_path):
    """As transformers reads it, which leaves the index of an earlier save behind."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"b": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files.weight_files(tmp_path) == {"a": "model.safetensors"}
