"""``symprune gain`` measures sizes and times of a checkpoint."""

from __future__ import annotations

import pytest
import torch

from symprune_lightning import CausalLMModule, SymPrune, Trainer, pack_checkpoint
from symprune_lightning.cli import gain
from tests.callbacks.examples import text_data
from tests.models import build
from tests.trainers import TRAINER


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gain") / "pruned"
    module = CausalLMModule(build("llama").to(torch.bfloat16))
    Trainer(**TRAINER).prune(
        module,
        datamodule=text_data(),
        output=str(folder),
        callbacks=SymPrune("wanda", pattern="2:4"),
    )
    return folder


def test_sizes(checkpoint, tmp_path):
    found = {size.form: size for size in gain.sizes(checkpoint)}
    assert found["safetensors"].bytes == (checkpoint / "model.safetensors").stat().st_size
    packed = pack_checkpoint(checkpoint, tmp_path / "packed") / "model.safetensors"
    # the file has names besides the tensors
    assert 0 <= packed.stat().st_size - found["symprune pack"].bytes < 20_000
    assert found["zip (deflate)"].bytes < found["safetensors"].bytes
    masks = (checkpoint / "symprune/masks.safetensors").stat().st_size
    assert found["symprune pack --masks_only"].bytes == masks
    assert found["zstd"].note == "not measured: pip install zstandard" or found["zstd"].bytes


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_speeds_and_memory(checkpoint, monkeypatch):
    monkeypatch.setattr(gain, "SECONDS", 0.001)
    dense, csr, scipy, structured = gain.speeds(gain.pruned_layers(checkpoint))
    weights = sum(
        p.numel() for n, p in build("llama").named_parameters() if "proj" in n and "embed" not in n
    )
    assert dense.bytes == 4 * weights
    assert csr.bytes > 0.5 * (4 + 8) * weights  # values and 64-bit columns of half of the weights
    assert 0.5 * (4 + 4) * weights < scipy.bytes < csr.bytes
    for speed in (dense, csr, scipy):
        assert all(seconds > 0 for seconds in speed.seconds.values())
    if not torch.cuda.is_available():
        assert structured.note == "not measured: no CUDA device"


def test_large_models_are_timed_in_part(checkpoint, monkeypatch):
    layers = gain.pruned_layers(checkpoint)
    assert gain.timed(layers) == layers
    monkeypatch.setattr(gain, "LIMIT", 4 * sum(layer.shape.numel() for layer in layers[:3]))
    assert gain.timed(layers) == layers[:3]
    monkeypatch.setattr(gain, "LIMIT", 1)
    assert gain.timed(layers) == layers[:1]


def test_two_of_four():
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 3]])
    assert gain._is_two_of_four(weight)
    assert not gain._is_two_of_four(weight + torch.eye(2, 4)[[1, 0]])
    assert not gain._is_two_of_four(weight[:, :3])


def test_command(checkpoint, symprune, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gain, "SECONDS", 0.001)
    symprune("gain", checkpoint)
    printed = capsys.readouterr().out
    for text in (
        "weights on disk",
        "symprune pack",
        "CSR (torch)",
        "14 of 14 pruned layers, float32, CPU",
    ):
        assert text in printed
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(SystemExit, match=r"no layer of .* has zeros: prune it first"):
        symprune("gain", tmp_path / "dense")
    pack_checkpoint(checkpoint, tmp_path / "packed")
    with pytest.raises(SystemExit, match="is a packed copy: restore the checkpoint first"):
        symprune("gain", tmp_path / "packed")
    with pytest.raises(SystemExit, match="there is no folder"):
        symprune("gain", tmp_path / "nowhere")


def test_a_slower_runtime_is_named():
    seconds = dict.fromkeys(gain.TOKENS, 1.0)
    dense = gain.Speed("dense (torch)", seconds, 10)
    slow = gain.Speed("CSR", {**seconds, 128: 2.0}, 10)
    fast = gain.Speed("other", dict.fromkeys(gain.TOKENS, 0.5), 10)
    notes = list(gain._notes([dense, slow, fast]))
    assert notes == ["CSR: slower than the dense product at 128 tokens"]
