"""Checks of a batch before a model runs it, where the model's own error would be obscure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.layers.names import module_names

TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"}
"""Arguments of a model that is given nothing but text."""

POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""Names of learned positions."""

MAX_OFFSET = 8
"""Rows that learned positions may have beyond their number, as those of OPT have."""


def check_input_ids(model: nn.Module, ids: object) -> None:
    """Check that a model has an embedding for each token id, and for each position.

    Args:
        model: The model; only models with the methods of transformers are checked.
        ids: Token ids, ``(batch, tokens)``; other values are not checked.

    Raises:
        ValueError: An id is not less than the number of embeddings, or the sequences are longer
            than the number of learned positions. On a GPU the model would fail with a device-side
            assert, after which the process cannot use the GPU any more.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        return
    embeddings = _embeddings(model)
    # subclasses, and models of several modalities, may have embeddings of their own for some ids
    if type(embeddings) is not nn.Embedding or ids.is_floating_point():
        return
    smallest, largest = torch.stack(ids.aminmax()).tolist()
    count = embeddings.num_embeddings
    if smallest < 0:
        raise ValueError(f"the data has token id {smallest}: ids begin at 0")
    if largest >= count:
        raise ValueError(
            f"the data has token id {largest}, and {type(model).__name__} has {count} embeddings: "
            f"is the tokenizer that of another model?"
        )
    limit = _num_positions(model, ids.shape[1])
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"the sequences have {ids.shape[1]} tokens, and {type(model).__name__} has learned "
            f"{limit} positions: use sequence_length={limit} or less"
        )


def check_batch(model: nn.Module, batch: Mapping[str, object]) -> None:
    """Check the token ids of a batch that holds nothing but text."""
    if batch.keys() <= TEXT_INPUTS:
        check_input_ids(model, batch.get("input_ids"))


def context_length(model: nn.Module) -> int | None:
    """Return the number of positions in the configuration of a model; ``None`` without one."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _embeddings(model: nn.Module) -> object:
    try:
        get_embeddings: Any = getattr(model, "get_input_embeddings", None)
        return get_embeddings() if callable(get_embeddings) else None
    except (AttributeError, NotImplementedError):  # a model without them, such as CLIP
        return None


def _num_positions(model: nn.Module, length: int) -> int | None:
    """Return the number of learned positions.

    ``None`` for positions that are computed, and where there are clearly enough for ``length``
    tokens: looking for them takes a pass over all modules, for every batch.
    """
    limit = context_length(model)
    if limit is None or 2 * length <= limit:
        return None
    for module, name in module_names(model).items():
        if not isinstance(module, nn.Embedding) or name.rpartition(".")[2] not in POSITIONS:
            continue
        if limit <= module.num_embeddings <= limit + MAX_OFFSET:
            # RoBERTa counts from the position after that of padding
            return limit if module.padding_idx is None else limit - module.padding_idx - 1
    return None
