"""Checks of a batch before a model runs it, where the model's own error would be obscure."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from symprune_lightning.engine.layers.names import module_names


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
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    if not callable(get_embeddings) or not isinstance(ids, Tensor):
        return
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        return
    count = getattr(get_embeddings(), "num_embeddings", None)
    if isinstance(count, int) and (largest := int(ids.max())) >= count:
        raise ValueError(
            f"the data has token id {largest}, and {type(model).__name__} has {count} embeddings: "
            f"is the tokenizer that of another model?"
        )
    limit = num_positions(model)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"the sequences have {ids.shape[1]} tokens, and {type(model).__name__} has learned "
            f"{limit} positions: use sequence_length={limit} or less"
        )


def num_positions(model: nn.Module) -> int | None:
    """Return the number of learned positions; ``None`` for positions that are computed."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    learned = [
        module.num_embeddings
        for module, name in module_names(model).items()
        if isinstance(module, nn.Embedding) and is_position_embedding(name)
    ]
    # some have a few rows more than positions, such as OPT
    if not learned or not isinstance(limit, int):
        return None
    return limit if any(limit <= count <= limit + 8 for count in learned) else None


def is_position_embedding(name: str) -> bool:
    """Return whether the name of a module is that of learned positions."""
    last = name.rpartition(".")[2]
    return last in ("wpe", "embed_positions", "position_embeddings", "position_embedding")
