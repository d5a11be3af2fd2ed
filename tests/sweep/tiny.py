"""Tiny configurations of any model type of transformers.

A general rule shrinks every size; families that it does not fit have overrides. The result has
random weights, a hidden size of 64, and as many layers as are needed for every kind of layer to
occur.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Fields = dict[str, Any]
VOCABULARY = 128
MAX_PARAMETERS = 60_000_000

TASKS: dict[str, tuple[Mapping[str, str], Any]] = {
    "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    "image-text": (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
    "seq2seq": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
}

SIZES = {
    64: "hidden_size d_model n_embd embed_dim emb_dim word_embed_proj_dim embedding_size dim_model "
    "encoder_hidden_size decoder_hidden_size d_embed pooler_hidden_size text_hidden_size "
    "out_hidden_size projector_hidden_size lru_width embedding_dim hidden_dim vision_output_dim "
    "output_dim projection_dim attention_hidden_size hidden_size_per_layer dim",
    128: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner ffn_hidden_size "
    "dff dim_ff intermediate_dim mlp_dim mlp_hidden_size dense_intermediate_size vocab_size "
    "decoder_intermediate_size encoder_intermediate_size decoder_vocab_size src_vocab_size "
    "vocab_size_per_layer_input tgt_vocab_size unpadded_vocab_size text_vocab_size",
    96: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size intermediate_size_mlp "
    "expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts linear_num_value_heads swa_num_attention_heads",
    2: "num_key_value_heads n_head_kv num_kv_heads multi_query_group_num num_experts_per_tok "
    "moe_topk moe_k top_k_experts num_experts_per_token linear_num_key_heads n_kv_heads "
    "swa_num_key_value_heads num_global_key_value_heads moe_top_k encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers moe_router_topk",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups "
    "mamba_n_groups first_k_dense_replace moe_layer_start_index",
    16: "head_dim kv_lora_rank v_head_dim qk_nope_head_dim state_size mamba_d_state ssm_state_size "
    "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim d_kv swa_head_dim "
    "global_head_dim hidden_size_per_layer_input index_head_dim attention_head_dim kv_channels "
    "mamba_headdim swa_v_head_dim",
    32: "q_lora_rank qk_head_dim o_lora_rank",
    8: "qk_rope_head_dim sliding_window chunk_size mamba_chunk_size attention_chunk_size "
    "attention_window_size sliding_window_size local_window_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
    "max_sequence_length max_target_positions max_source_positions seq_length",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
BY_LAYER = re.compile(
    r"layer_types|layers_block_type|block_types|mlp_layer_types|layer_type_list|hybrid_override|"
    r"attn_types|no_rope|sparsity|moe_layers|layers_types|indexer_types|block_configs"
)
TOKEN_ID = re.compile(r"(_token_id|_token_index|_id|_index|_token_ids|_idx)$")
DROP = object()
"""Leaves a field at its default."""

OVERRIDES: dict[str, Fields] = {
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "mamba": {"intermediate_size": 128, "time_step_rank": 8},
    "falcon_mamba": {"intermediate_size": 128, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "n_groups": 1, "expand": 2},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "mamba_num_heads": 8,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
    },
    "longcat_flash": {
        "num_layers": 2,
        "zero_expert_num": 2,
        "num_hidden_layers": DROP,
        "qk_head_dim": DROP,
        "head_dim": 8,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mpt": {"max_seq_len": 64},
    "phi3": {"pad_token_id": 0},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ("recurrent", "recurrent", "attention"),
    },
    "switch_transformers": {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 64,
    },
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 64},
    "gemma4_text@moe": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 96,
    },
}
"""Model type to fields; after ``@`` comes a variant."""


def shrink(cls: type[PretrainedConfig], variant: str = "") -> PretrainedConfig:
    """Return a tiny configuration of a class."""
    fields = {k: v for k, v in vars(cls()).items() if not k.startswith("_")}
    for name in ("dtype", "transformers_version", "architectures", "id2label", "label2id"):
        fields.pop(name, None)
    small = {
        name: min(SIZE_OF[name], value) if value > 0 else value
        for name, value in fields.items()
        if name in SIZE_OF and isinstance(value, int) and not isinstance(value, bool)
    }
    small |= _fewer_layers(fields) | _token_ids(fields) | _rotary(cls, fields, small)
    small |= {k: shrink(type(v)) for k, v in fields.items() if isinstance(v, PretrainedConfig)}
    if "qk_rope_head_dim" in fields:
        small |= {name: DROP for name in ("head_dim", "qk_head_dim") if name in fields}
        small |= {"num_key_value_heads": 4} if "num_key_value_heads" in fields else {}
    small |= OVERRIDES.get(cls.model_type, {}) | _special(cls.model_type)
    small |= OVERRIDES.get(f"{cls.model_type}@{variant}", {})
    return cls(**{name: value for name, value in small.items() if value is not DROP})


def _special(model_type: str) -> Fields:
    if model_type != "dbrx":
        return {}
    from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

    attention = DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8.0)
    attention.rope_theta = 10000.0  # type: ignore[attr-defined]
    experts = DbrxFFNConfig(hidden_size=64, ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2)
    return {"attn_config": attention, "ffn_config": experts, "d_model": 64}


def _fewer_layers(fields: Fields) -> Fields:
    """Return the depth and the lists by layer, so that every kind of layer occurs."""
    key = next((k for k in DEPTHS if isinstance(fields.get(k), int)), None)
    if key is None:
        return {}
    depth = fields[key]
    lists = {k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) == depth > 1}
    by_layer = {k: v for k, v in lists.items() if BY_LAYER.search(k)}
    chosen = _chosen(by_layer) if by_layer else list(range(min(2, depth)))
    small: Fields = {key: len(chosen)}
    for name, values in lists.items():
        size = SIZE_OF.get(name)
        small[name] = [values[i] if size is None else size for i in chosen]
    return small


def _chosen(lists: Mapping[str, Sequence[Any]]) -> list[int]:
    """Return layers among which every combination of the lists occurs, at least two."""
    depth = len(next(iter(lists.values())))
    combinations = [str([values[i] for values in lists.values()]) for i in range(depth)]
    chosen = sorted({combinations.index(combination) for combination in combinations})
    rest = [i for i in range(depth) if i not in chosen]
    return sorted(chosen + rest[: max(0, 2 - len(chosen))])[:8]


def _token_ids(fields: Fields) -> Fields:
    """Return ids inside the tiny vocabulary."""
    small: Fields = {}
    free = VOCABULARY - 1
    for name in sorted(k for k in fields if TOKEN_ID.search(k) and k != "layer_idx"):
        value = fields[name]
        if isinstance(value, int) and value >= 100:
            small[name], free = free, free - 1
        elif isinstance(value, list) and value and all(isinstance(x, int) for x in value):
            small[name] = [free - i for i in range(len(value))]
            free -= len(value)
    return small


def _rotary(cls: type[PretrainedConfig], fields: Fields, small: Fields) -> Fields:
    """Return sections of a multi-dimensional rotary embedding that fit the head size."""
    rotary = fields.get("rope_parameters")
    if not isinstance(rotary, dict) or "mrope_section" not in rotary:
        return {}
    size = small.get("head_dim") or small.get("hidden_size", 64) // 4
    half = int(size * rotary.get("partial_rotary_factor", 1.0)) // 2
    first = max(1, half // 4)
    rest = (half - first) // 2
    return {"rope_parameters": {**rotary, "mrope_section": [half - 2 * rest, rest, rest]}}


def build(task: str, name: str) -> PreTrainedModel:
    """Return a tiny random model.

    Args:
        task: A key of ``TASKS``.
        name: Model type, with a variant after ``@``.

    Raises:
        Exception: The configuration does not fit the family.
    """
    model_type, _, variant = name.partition("@")
    config = shrink(CONFIG_MAPPING[model_type], variant)
    factory = TASKS[task][1]
    with torch.device("meta"):
        size = sum(p.numel() for p in factory.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{name} has {size:,} parameters at tiny size")
    torch.manual_seed(0)
    model: PreTrainedModel = factory.from_config(config).float().eval()
    _fill(model)
    return model


def _fill(model: nn.Module) -> None:
    """Replace zeros and uninitialised values: a weight that is zero counts as pruned."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values = parameter.detach()
        is_bad = not bool(values.isfinite().all()) or bool((values.abs() > 1e3).any())
        if values.dim() >= 2 and (is_bad or bool((values == 0).any())):
            values.copy_(torch.randn(values.shape, generator=generator) * 0.05)
        elif is_bad:
            values.fill_(1.0)


def batches(task: str) -> list[dict[str, torch.Tensor]]:
    """Return three batches of two sequences of 16 tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens() -> torch.Tensor:
        return torch.randint(3, 100, (2, 16), generator=generator)

    names = ["input_ids", "decoder_input_ids"] if task == "seq2seq" else ["input_ids"]
    return [{name: tokens() for name in names} for _ in range(3)]
