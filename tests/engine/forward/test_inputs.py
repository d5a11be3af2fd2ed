"""Token ids and positions that a model does not have."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from lightning.pytorch import seed_everything

from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune, Trainer, prune_model
from symprune_lightning.errors import PruningWarning
from tests.models import build, gpt2, llama
from tests.texts import texts, tokenizer

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 3, "training_sequences": 2}


def test_sequences_longer_than_the_positions_of_a_model():
    data = CalibrationDataModule(texts(80, 60), tokenizer(), **{**SIZES, "sequence_length": 129})
    with pytest.raises(ValueError, match="GPT2LMHeadModel has learned 128 positions: use seq"):
        run(gpt2(), data)
    with pytest.warns(PruningWarning, match="129 tokens, and LlamaForCausalLM was trained"):
        run(llama(), data)  # rotary positions are computed


def test_ids_without_an_embedding():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match=r"token id \d+, and LlamaForCausalLM has 50 embeddings"):
        run(llama(vocab_size=50), data)


def test_batches_of_the_user_are_checked_too():
    model = build("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="has learned 128 positions"):
        prune_model(model, [{"input_ids": torch.zeros(1, 130, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="token id 64, and GPT2LMHeadModel has 64 embeddings"):
        prune_model(model, [{"input_ids": torch.full((1, 8), 64)}])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_positions_of_roberta_begin_after_padding():
    config = tf.XLMRobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=18,
        is_decoder=True,
    )
    model = tf.XLMRobertaForCausalLM(config)
    prune_model(model, [{"input_ids": torch.full((1, 16), 5)}])
    with pytest.raises(ValueError, match="has learned 16 positions"):
        prune_model(model, [{"input_ids": torch.full((1, 17), 5)}])


def test_a_model_without_common_embeddings_is_not_checked():
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "projection_dim": 16}
    vision = {**text, "image_size": 8, "patch_size": 4} | heads
    vision.pop("vocab_size")
    config = tf.CLIPConfig(text_config=text | heads, vision_config=vision, projection_dim=16)
    batch = {"input_ids": torch.full((2, 8), 5), "pixel_values": torch.randn(2, 3, 8, 8)}
    assert prune_model(tf.CLIPModel(config), [batch]).sparsity == 0.5


def run(model, data):
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(
        CausalLMModule(model), datamodule=data, callbacks=SymPrune("wanda"), verbose=False
    )
