"""Weights, masks and statistics to refine."""

from __future__ import annotations

import torch

from symprune_lightning.functional.patterns import Unstructured
from symprune_lightning.functional.scores import Wanda
from symprune_lightning.functional.statistics import Moments, Statistics


def example(rows=6, columns=20, sparsity=0.5, seed=0, dtype=torch.float32, odd=True, pattern=None):
    """Weights, a Wanda mask and statistics; ``odd``: with a dead, a constant and a huge channel."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x = torch.randn(3, 30, columns, generator=generator) + torch.randn(columns, generator=generator)
    if odd:
        x[..., 0] = 0
    if odd and columns > 2:
        x[..., 1] = 2.5
        x[..., 2] *= 1e4
    flat = x.double().flatten(0, 1)
    statistics = Statistics(
        input=Moments.of(x),
        sequence_variance=x.double().var(1, correction=0).mean(0),
        gram=flat.T @ flat / len(flat),
    )
    pattern = pattern or Unstructured(sparsity)
    mask = pattern.mask(Wanda()(weight, statistics))
    return weight, mask, statistics


def correlated(rows=8, columns=24, seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    x = (torch.randn(tokens, columns, generator=generator) @ mix).double()
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Statistics(layer="a", gram=x.T @ x / tokens)
