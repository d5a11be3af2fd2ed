from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from symprune_lightning import CausalLMModule, SymPrune
from symprune_lightning.checkpoints.export import MANIFEST
from tests.callbacks.test_pruning import Plain, data, loader, module, quiet, sparsity
from tests.models import build


class Recording(pl.Callback):
    def __init__(self):
        self.calls = []

    def on_validation_start(self, trainer, pl_module):
        self.calls.append("validate")

    def on_test_start(self, trainer, pl_module):
        self.calls.append("test")

    def on_fit_start(self, trainer, pl_module):
        self.calls.append("fit")


def test_callbacks_are_there_for_one_call():
    recording, kept = Recording(), Recording()
    trainer = quiet(callbacks=[kept], max_steps=1, num_sanity_val_steps=0, limit_val_batches=1)
    before = list(trainer.callbacks)
    trainer.validate(Plain(), loader(), callbacks=recording, verbose=False)
    trainer.test(Plain(), loader(), callbacks=[recording], verbose=False)
    trainer.fit(Plain(), loader(), callbacks=[recording])
    trainer.validate(Plain(), loader(), verbose=False)
    assert recording.calls == ["validate", "test", "fit"]
    assert kept.calls == ["validate", "test", "fit", "validate"]
    assert trainer.callbacks == before


def test_callbacks_are_restored_after_an_error():
    trainer = quiet()
    before = list(trainer.callbacks)
    with pytest.raises(ValueError, match="no calibration data"):
        trainer.validate(Plain(), loader(), callbacks=SymPrune(), verbose=False)
    assert trainer.callbacks == before


class Saving(Checkpoint):
    """Notes how sparse the module is at the moment at which checkpoints write the last one."""

    def on_train_end(self, trainer, pl_module):
        self.sparsity = sparsity(pl_module)


def test_checkpoints_come_after_pruning_whatever_the_order():
    saving, prune = Saving(), SymPrune(when="fit_end", calibration=loader())
    quiet(max_steps=1).fit(Plain(), loader(), callbacks=[saving, prune])
    assert saving.sparsity == 0.5


def test_prune_writes_a_checkpoint_that_transformers_loads(tmp_path):
    model, prune = module(), SymPrune(refine="r2dsnot")
    dense = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    result = quiet().prune(model, datamodule=data(), output=str(tmp_path / "out"), callbacks=prune)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, model.model.get_parameter(name))
    for layer, mask in result.masks.items():
        assert torch.equal(loaded.get_submodule(layer).weight != 0, mask)
    assert torch.equal(loaded.model.embed_tokens.weight, dense["model.embed_tokens.weight"])
    assert torch.equal(loaded.lm_head.weight, dense["lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 64


def test_manifest(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "dense")
    model, prune, text = CausalLMModule(str(tmp_path / "dense")), SymPrune(sparsity=0.25), data()
    result = quiet().prune(model, datamodule=text, output=str(tmp_path / "out"), callbacks=prune)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["model"] == str(tmp_path / "dense")
    assert manifest["settings"]["score"] == {"name": "RIA", "alpha": 0.5}
    assert manifest["data"]["sha256"] == text.hashes
    assert manifest["data"]["seed"] == 0
    assert manifest["sparsity"] == result.sparsity == 0.25
    assert [x["name"] for x in manifest["layers"]] == list(result.masks)
    assert manifest["metrics"]["dense"] == prune.dense_metrics
    assert manifest["metrics"]["pruned"]["val_perplexity"] > 0
    assert {"torch", "transformers", "lightning", "python"} <= set(manifest["versions"])
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in saved, "tied weights are stored once"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_prune_needs_one_pruning_callback():
    with pytest.raises(ValueError, match="there are 0"):
        quiet().prune(module(), datamodule=data())
    with pytest.raises(ValueError, match="there are 2"):
        quiet().prune(module(), datamodule=data(), callbacks=[SymPrune(), SymPrune()])
    with pytest.raises(ValueError, match="there are 0"):
        quiet().prune(module(), datamodule=data(), callbacks=[SymPrune(when="test")])


def test_output_is_checked_before_anything_is_run(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    model = module()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        quiet().prune(model, datamodule=data(), output=str(tmp_path), callbacks=SymPrune())
    assert (model.model.model.layers[0].mlp.up_proj.weight != 0).all()


def test_output_of_what_is_no_transformers_model(tmp_path):
    with pytest.raises(TypeError, match="writes transformers models, and Plain is none"):
        quiet().prune(
            Plain(),
            loader(),
            output=str(tmp_path / "out"),
            callbacks=SymPrune(calibration=loader()),
        )
    assert not (tmp_path / "out").exists()
