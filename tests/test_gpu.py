"""Tests that need a GPU; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    MaskedFinetuning,
    StreamedCheckpoint,
    SymPrune,
    Trainer,
    load_masks,
    prune_model,
)
from tests.models import VOCABULARY, batches, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

METHODS = {
    "wanda": {"score": "wanda"},
    "ria-r2dsnot": {"score": "ria", "refine": "r2dsnot"},
    "exactswap": {"score": "wanda", "refine": "exactswap"},
    "2:4": {"score": "wanda", "pattern": "2:4"},
    "update": {"score": "ria", "update": "obsupdate"},
}


def on_gpu():
    return [{name: x.cuda() for name, x in batch.items()} for batch in batches()]


@pytest.mark.parametrize("calibration_order", ["layer", "block", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_masks_are_nearly_those_of_the_cpu(method, calibration_order):
    options = {**METHODS[method], "calibration_order": calibration_order}
    cpu = prune_model(build("llama"), batches(), **options)
    gpu = prune_model(build("llama").cuda(), on_gpu(), **options)
    assert gpu.sparsity == cpu.sparsity
    first = next(iter(cpu.masks))  # rounding changes the inputs of later layers
    assert (gpu.masks[first] != cpu.masks[first]).float().mean() < 0.02


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_trainer_on_one_gpu(precision):
    texts = torch.randint(3, VOCABULARY, (20, 16)).tolist()
    data = CalibrationDataModule(texts, sequences=4, evaluation_sequences=4, sequence_length=16)
    callback = SymPrune(sparsity=0.5, refine="exactswap")
    Trainer(accelerator="gpu", devices=1, precision=precision, logger=False).validate(
        CausalLMModule(build("llama")), datamodule=data, callbacks=callback, verbose=False
    )
    assert callback.result is not None
    assert callback.result.sparsity == 0.5


def test_streaming_through_a_gpu(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    checkpoint = StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse", device="cuda")
    with checkpoint:
        result = prune_model(checkpoint.model, on_gpu(), score="wanda", placement=checkpoint)
        checkpoint.save({})
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").model.layers
    assert (layers[1].mlp.up_proj.weight == 0).float().mean() == result.sparsity
    assert load_masks(tmp_path / "sparse") == result.masks


def test_masked_finetuning_with_a_gradient_scaler():
    masked = MaskedFinetuning()
    data = CalibrationDataModule(
        [[3 + (i + j) % 60 for j in range(16)] for i in range(16)],
        sequences=4,
        evaluation_sequences=4,
        training_sequences=8,
        sequence_length=16,
    )
    module = CausalLMModule(build("llama").train(), learning_rate=1e-2)
    Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(module, datamodule=data, callbacks=[SymPrune(when="fit_start"), masked])
    assert len(masked.masks) == 14
    for name, mask in masked.masks.items():
        weight = module.prunable_model.get_submodule(name).weight.cpu()
        assert not weight[~mask].any(), name


def test_sparse_tensor_cores_accept_2_4_weights():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs Ampere or later")
    layer = torch.nn.Linear(256, 256, bias=False).half().cuda()
    x = torch.randn(64, 256, dtype=torch.float16, device="cuda")
    prune_model(torch.nn.Sequential(layer), [x], pattern="2:4")
    expected = layer(x)
    layer.weight = torch.nn.Parameter(to_sparse_semi_structured(layer.weight))
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
