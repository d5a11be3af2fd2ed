"""Calibration text sampled from the model to be pruned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.engine.eval_mode import eval_mode

CHUNK = 16
"""Number of sequences sampled at once."""


@dataclass(frozen=True)
class SelfText:
    """Sequences sampled from the model that is pruned (arXiv 2410.17711).

    Each sequence begins with the beginning-of-sequence token, or with one of ``prefixes``, and is
    sampled token by token from the model's full distribution. After an end-of-sequence token,
    sampling continues in the same sequence.

    Attributes:
        temperature: Divides the logits before the softmax. Default: 1.0, the model's own
            distribution.
        prefixes: Prompts that sequences start with, assigned round-robin; need a tokenizer.
            Default: ``()``, the beginning-of-sequence token.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    temperature: float = 1.0
    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")


def sample_sequences(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    source: SelfText,
    *,
    count: int,
    length: int,
    seed: int,
) -> Tensor:
    """Sample sequences from a model.

    Args:
        model: The dense model, on any device; its training mode is restored.
        tokenizer: Encodes the prefixes; not needed without any.
        source: How to sample.
        count: Number of sequences.
        length: Number of tokens per sequence, including the prefix.
        seed: Seed of the random numbers.

    Returns:
        Token ids on the CPU, shape ``(count, length)``.

    Raises:
        ValueError: The model has no beginning-of-sequence token and no prefixes are given, or a
            prefix is not shorter than a sequence.
    """
    # a generator on the CPU: the same numbers on all ranks, whatever their device
    generator = torch.Generator().manual_seed(seed)
    starts = _starts(model, tokenizer, source)
    rows: list[Tensor] = []
    longest = max(len(start) for start in starts)
    if longest >= length:
        raise ValueError(
            f"a prefix has {longest} tokens, and must be shorter than sequence_length, which is "
            f"{length}"
        )
    # not inference mode: FSDP2 would unshard the parameters as tensors that cannot be trained
    with torch.inference_mode(False), torch.no_grad(), eval_mode(model):
        for start, number in Counter(islice(cycle(starts), count)).items():
            for begin in range(0, number, CHUNK):
                ids = torch.tensor([start] * min(CHUNK, number - begin), device=model.device)
                rows += _continue(model, ids, length, source.temperature, generator).cpu()
    return torch.stack(rows)


def _continue(
    model: PreTrainedModel, ids: Tensor, length: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Append sampled tokens until sequences have their length."""
    forward: Any = model
    output = forward(input_ids=ids, use_cache=True, logits_to_keep=1)
    while True:
        probabilities = (output.logits[:, -1].float() / temperature).softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, token], 1)
        if ids.shape[1] == length:
            return ids
        cache = getattr(output, "past_key_values", None)
        if cache is None:  # a model with another kind of cache, such as Mamba
            output = forward(input_ids=ids, logits_to_keep=1)
        else:
            output = forward(
                input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
            )


def _starts(
    model: PreTrainedModel, tokenizer: Tokenizer | None, source: SelfText
) -> list[tuple[int, ...]]:
    if source.prefixes:
        if tokenizer is None:
            raise ValueError("prefixes need a tokenizer: pass tokenizer=<name of the model>")
        return [tuple(tokenizer(prefix)["input_ids"]) for prefix in source.prefixes]
    text_config = model.config.get_text_config()
    # models without a beginning-of-sequence token separate texts by the end-of-sequence token
    ids = [
        getattr(config, name, None)
        for name in ("bos_token_id", "eos_token_id")
        for config in (model.config, text_config)
    ]
    start = next((token for token in ids if token is not None), None)
    if not isinstance(start, int) or start >= text_config.vocab_size:
        raise ValueError(
            f"{type(model).__name__} has no beginning-of-sequence token to start from: pass "
            f"SelfText(prefixes=…)"
        )
    return [(start,)]
