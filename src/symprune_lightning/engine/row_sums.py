"""Sums over the rows of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from symprune_lightning.functional.statistics import Statistics
from symprune_lightning.functional.tensors import as_number, at_least_float32, row_chunks

NUM_SUMS = 5
"""Length of the vector that ``error_sums`` returns."""


def column_sum(weight: Tensor) -> Tensor:
    """Return ``Σ_q |W[q,r]|``, ``(in_features,)``, float32 at least."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for part in row_chunks(weight):
        total += at_least_float32(part).abs().sum(0)
    return total.to(torch.promote_types(weight.dtype, torch.float32))


def error_sums(
    weight: Tensor, mask: Tensor, refined: Tensor, updated: Tensor | None, statistics: Statistics
) -> Tensor:
    """Return sums over rows, to be added up over ranks.

    Returns:
        Float64 vector: squared output; squared errors by the initial mask, after refining, after
        the update; swaps.
    """
    swaps = (refined & ~mask).sum(dtype=torch.float64)
    sums = [torch.zeros_like(swaps)] * (NUM_SUMS - 1)
    if statistics.input is not None:
        sums[0] = _total_error(weight, statistics)
        sums[1] = sums[2] = _total_error(weight * as_number(~mask, weight.dtype), statistics)
        if refined is not mask:
            removed = weight * as_number(~refined, weight.dtype)
            sums[2] = _total_error(removed, statistics)
        if updated is not None:
            sums[3] = _total_error(weight - updated, statistics)
    return torch.stack([*sums, swaps]).cpu()  # at once: a GPU waits for each copy to the host


def _total_error(delta: Tensor, statistics: Statistics) -> Tensor:
    return statistics.squared_error(delta).sum().double()
