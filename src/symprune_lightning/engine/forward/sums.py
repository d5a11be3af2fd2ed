"""Running sums over calibration tokens, from which the statistics of a layer are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from symprune_lightning.functional.statistics import Moments, Need
from symprune_lightning.functional.tensors import at_least_float32

PANEL = 192
"""Rows of a Gram matrix computed in one product. Only the upper triangle is computed, panel by
panel: narrower panels skip more of the lower one but make the products less efficient."""


class RunningSum(ABC):
    """Float64 totals over tokens, so that merging batches and ranks is addition.

    Args:
        channels: Number of channels.
        device: Device of the totals.
    """

    shapes: ClassVar[dict[str, int]]
    """Name of each total to its number of dimensions, all of size ``channels``."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.totals = {
            name: torch.zeros((channels,) * dims, dtype=torch.float64, device=device)
            for name, dims in self.shapes.items()
        }

    def __add__(self, other: Self) -> Self:
        result = type(self)(0)
        result.totals = {name: total + other.totals[name] for name, total in self.totals.items()}
        return result

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add activations of shape ``(..., tokens, channels)``."""

    @property
    @abstractmethod
    def value(self) -> Moments | Tensor:
        """The statistic over all tokens added so far."""


class InputMoments(RunningSum):
    """Running [`Moments`][symprune_lightning.functional.statistics.Moments].

    Examples:
        >>> sums = InputMoments(channels=1)
        >>> sums.update(torch.tensor([[[1.0], [3.0]]]))
        >>> sums.value.mean.tolist()
        [2.0]
    """

    shapes: ClassVar[dict[str, int]] = {"tokens": 0, "total": 1, "total_square": 1}

    def update(self, x: Tensor) -> None:
        """See `RunningSum`."""
        moments = Moments.of(x)
        self.totals["tokens"] += moments.tokens
        self.totals["total"] += moments.total
        self.totals["total_square"] += moments.total_square

    @property
    def value(self) -> Moments:
        """The moments."""
        return Moments(**self.totals)


class SequenceVariance(RunningSum):
    """Token-weighted mean of the population variance inside each sequence."""

    shapes: ClassVar[dict[str, int]] = {"tokens": 0, "total": 1}

    def update(self, x: Tensor) -> None:
        """See `RunningSum`."""
        tokens, channels = x.shape[-2:]
        variance = x.double().var(-2, correction=0).reshape(-1, channels)
        self.totals["tokens"] += tokens * len(variance)
        self.totals["total"] += tokens * variance.sum(0)

    @property
    def value(self) -> Tensor:
        """The variance, ``(channels,)``, float64."""
        return self.totals["total"] / self.totals["tokens"]


class GramMatrix(RunningSum):
    """Running ``G = E[x xᵀ]``; costs tokens · channels² operations and channels² of memory."""

    shapes: ClassVar[dict[str, int]] = {"tokens": 0, "total": 2}

    def update(self, x: Tensor) -> None:
        """See `RunningSum`."""
        flat = at_least_float32(x.reshape(-1, x.shape[-1]))
        self.totals["tokens"] += len(flat)
        for start in range(0, flat.shape[1], PANEL):
            panel = flat[:, start : start + PANEL]
            self.totals["total"][start : start + PANEL, start:] += panel.T @ flat[:, start:]

    @property
    def value(self) -> Tensor:
        """The Gram matrix, ``(channels, channels)``, float64."""
        # the panels fill the diagonal blocks too, so only the upper triangle is complete
        upper = self.totals["total"].triu().div_(self.totals["tokens"])
        return upper.add_(upper.triu(1).T)


INPUT_SUMS: dict[Need, type[RunningSum]] = {
    "input": InputMoments,
    "sequence_variance": SequenceVariance,
    "gram": GramMatrix,
}
"""Statistics of a layer's input."""
