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


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


def gpt_oss() -> tf.PreTrainedModel:
    config = {**DECODER, "intermediate_size": 48}
    layer_types = ["sliding_attention", "full_attention"]
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **config,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            layer_types=layer_types,
        )
    )


def deepseek_v3() -> tf.PreTrainedModel:
    config = {k: v for k, v in DECODER.items() if k != "head_dim"} | {"num_key_value_heads": 4}
    return tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **config,
            **EXPERTS,
            n_routed_experts=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    )


def llama4() -> tf.PreTrainedModel:
    return tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **{**DECODER, "intermediate_size": 48},
            intermediate_size_mlp=64,
            num_local_experts=4,
            interleave_moe_layer_step=1,
            attention_chunk_size=8,
        )
    )


MIXTURES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**DECODER, **EXPERTS, num_experts=4)
    ),
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "llama4": llama4,
}


def build(name: str, seed: int = 0) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    model = (vit() if name == "vit" else (LANGUAGE | MIXTURES)[name]()).eval()
    if name in MIXTURES:  # some of these initialise experts with zeros, which are pruned already
        for parameter in model.parameters():
            if parameter.dim() == 3:
                nn.init.normal_(parameter, std=0.1)
    return model


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
