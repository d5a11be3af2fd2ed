"""Tiny models of real architectures, built from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY = 64
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**options: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, **options}))


def gpt2() -> tf.PreTrainedModel:
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    return tf.GPT2LMHeadModel(config)


def opt(embedding: int = 32) -> tf.PreTrainedModel:
    config = tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=embedding,
    )
    return tf.OPTForCausalLM(config)


def gemma3() -> tf.PreTrainedModel:
    layer_types = ["sliding_attention", "full_attention"]
    config = tf.Gemma3TextConfig(**DECODER, sliding_window=4, layer_types=layer_types)
    return tf.Gemma3ForCausalLM(config)


def vit() -> tf.PreTrainedModel:
    config = tf.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    return tf.ViTForImageClassification(config)


LANGUAGE: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=4)),
    "gemma3": gemma3,
    "opt": opt,
}


def build(name: str, seed: int = 0) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    return (vit() if name == "vit" else LANGUAGE[name]()).eval()


def batches(
    name: str = "llama", count: int = 3, size: int = 2, length: int = 16
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        images = torch.randn(count, size, 3, 16, 16, generator=generator)
        return [{"pixel_values": x} for x in images]
    tokens = torch.randint(3, VOCABULARY, (count, size, length), generator=generator)
    return [{"input_ids": x} for x in tokens]


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
