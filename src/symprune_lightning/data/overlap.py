"""Overlap between splits: evaluation texts that are also used for calibration or training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

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


def check_overlap(splits: Mapping[str, Tensor], evaluation: str) -> None:
    """Refuse or name evaluation tokens that are in the calibration or training split too.

    Args:
        splits: Token ids of the text of each split, ``(tokens,)``.
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
