"""Padding: which tokens of a batch are real, where that can be known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from symprune_lightning.errors import PruningWarning


def valid_tokens(data: Any, model: nn.Module) -> Tensor | None:
    """Return which tokens of a batch are real, if its ``attention_mask`` marks some as padding.

    The mask of an encoder-decoder model is that of the encoder. If its decoder receives sequences
    of the same length, the inputs of a layer do not tell whose tokens they are; nor do they tell
    sequences from tokens in a batch of as many of both. Padding is measured then, with a warning.

    Args:
        data: The batch.
        model: The model that it is passed to.

    Returns:
        Bool, ``(batch, tokens)``; ``None`` without padding, or if it is not known.
    """
    mask = data.get("attention_mask") if isinstance(data, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    if mask.shape[0] == mask.shape[1] > 1:
        _warn("a batch has as many sequences as tokens")
        return None
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        decoder = next((data[k] for k in ("decoder_input_ids", "labels") if k in data), None)
        if isinstance(decoder, Tensor) and decoder.shape == mask.shape:
            _warn("encoder and decoder sequences of a batch have the same length")
            return None
    return mask.bool().clone()  # a copy: the tensors of a loader may be of inference mode


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}, so the padding of its attention_mask cannot be recognised in hidden states, "
        f"and is measured like other tokens: pad to another length",
        PruningWarning,
        stacklevel=3,
    )


def aligned(valid: Tensor | None, axes: Sequence[int]) -> Tensor | None:
    """Return a mask of tokens in the layout of hidden states.

    Args:
        valid: Bool, ``(batch, tokens)``, or ``(rows,)`` for hidden states with these rows.
        axes: Sizes of the hidden states' dimensions but the last: ``(batch, tokens, ...)``,
            ``(tokens, batch, ...)`` or ``(batch · tokens,)``, also with dimensions of size 1.

    Returns:
        Bool with these dimensions; ``None`` if they are none of these, and padding is not known.
    """
    axes = tuple(axes)
    if valid is None:
        return None
    for layout in (valid, valid.T if valid.dim() == 2 else valid):
        if axes[: layout.dim()] == layout.shape:
            trailing = [1] * (len(axes) - layout.dim())
            return layout.reshape(*layout.shape, *trailing).expand(axes)
    squeezed = tuple(size for size in axes if size != 1)
    if squeezed in (tuple(valid.shape), (valid.numel(),)):
        return valid.reshape(axes)
    return None
