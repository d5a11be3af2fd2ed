"""Windows of tokens: packing of texts, and overlap between splits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.errors import PruningWarning

OVERLAP_WINDOW = 32
"""Tokens in a row that two splits must share to overlap there."""

MAX_OVERLAP = 0.3
"""Share of evaluation tokens in calibration or training texts above which they are refused.

Texts of one source repeat passages: those of the Python manual share a tenth.
"""

MIN_DISTINCT = 4
"""Distinct tokens of a run below which it holds no text: unknown tokens, rulers, empty lines."""

NAMED_OVERLAP = 0.15
"""Share above which a warning says so."""


def text_prefix(tokenizer: Tokenizer, add_bos: bool | None) -> list[int]:
    """Return the tokens that every window begins with.

    Args:
        tokenizer: The tokenizer.
        add_bos: Whether that is the beginning-of-sequence token; ``None`` for what the tokenizer
            puts in front of a text.

    Raises:
        ValueError: ``add_bos`` is ``True``, and the tokenizer has no such token.
    """
    if add_bos is None:
        # a letter, or what the tokenizer makes of nothing if it has no letters
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        ids: list[int] = tokenizer("a" if plain else "")["input_ids"]
        if not plain:
            return [i for i in ids[:1] if i == tokenizer.bos_token_id]
        starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return ids[: next(starts, 0)]
    if not add_bos:
        return []
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"add_bos=True, but {type(tokenizer).__name__} has no beginning-of-sequence token"
        )
    return [int(tokenizer.bos_token_id)]


def pack(
    texts: Iterator[Sequence[int]], count: int, length: int, prefix: Sequence[int], split: str
) -> tuple[Tensor, list[int]]:
    """Concatenate texts until windows are full.

    Args:
        texts: Token ids of each text.
        count: Number of windows.
        length: Tokens in each, with the prefix.
        prefix: Tokens that each begins with.
        split: Name of the split in messages.

    Returns:
        Token ids, shape ``(count, length)``; and the rest of the last text.

    Raises:
        ValueError: The texts are too short, or the prefix leaves no room.
    """
    size = length - len(prefix)
    if size < 1:
        raise ValueError(
            f"sequence_length is {length}, and each sequence begins with {len(prefix)} special "
            f"tokens: use longer sequences"
        )
    required = count * size
    ids: list[int] = []
    for text in texts:
        ids.extend(text)
        if len(ids) >= required:
            rows = torch.tensor(ids[:required]).view(count, size)
            start = torch.tensor(list(prefix), dtype=rows.dtype).expand(count, -1)
            return torch.cat([start, rows], 1), ids[required:]
    raise ValueError(
        f"the texts for {split} are too short: {count} sequences of {length} tokens need "
        f"{required:,} tokens, but only {len(ids):,} are available; use fewer or shorter "
        f"sequences, or more text"
    )


def check_overlap(splits: Mapping[str, Tensor], evaluation: str) -> None:
    """Refuse or name evaluation tokens that are in the calibration or training split too.

    Args:
        splits: Token ids by split, ``(windows, length)`` each, without the tokens that every window
            begins with.
        evaluation: Prefix of the names of the evaluation splits.

    Raises:
        ValueError: More than 30 % of the evaluation tokens are in runs that another split has.
    """
    fitted = {name: ids for name, ids in splits.items() if not name.startswith(evaluation)}
    for name, ids in splits.items():
        if not name.startswith(evaluation):
            continue
        for other, others in fitted.items():
            share = overlap(ids, others)
            message = (
                f"{share:.0%} of the tokens for {name} are also used for {other}, in the same "
                f"order: the pruned model is evaluated on texts that it was fitted to; pass "
                f"other texts as evaluation="
            )
            if share > MAX_OVERLAP:
                raise ValueError(message)
            if share > NAMED_OVERLAP:
                warnings.warn(message, PruningWarning, stacklevel=4)


def overlap(ids: Tensor, others: Tensor) -> float:
    """Return the share of the runs of 32 tokens of a split that another split contains.

    0 if a split has fewer tokens.
    """
    if min(ids.numel(), others.numel()) < OVERLAP_WINDOW:
        return 0.0
    runs = _runs(ids)
    common = torch.isin(_hashes(runs), _hashes(_runs(others)))
    sorted_runs = runs[common].sort(1).values
    num_distinct = 1 + (sorted_runs[:, 1:] != sorted_runs[:, :-1]).sum(1)
    return float((num_distinct >= MIN_DISTINCT).sum()) / len(runs)


def _runs(ids: Tensor) -> Tensor:
    """Return every run of ``OVERLAP_WINDOW`` tokens, ``(runs, OVERLAP_WINDOW)``."""
    return ids.flatten().long().unfold(0, OVERLAP_WINDOW, 1)


def _hashes(runs: Tensor) -> Tensor:
    """Return a hash of each run."""
    hashes = torch.zeros(len(runs), dtype=torch.int64)
    for column in runs.unbind(1):  # wraps around modulo 2⁶⁴
        hashes = hashes * 6364136223846793005 + column + 1442695040888963407
    return hashes
