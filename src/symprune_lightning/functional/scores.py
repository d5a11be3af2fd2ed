"""Scores: how important each weight is. Higher is kept.

A score is a frozen dataclass that maps a weight ``W`` of shape ``(out_features, in_features)`` and
the layer's [`Statistics`][symprune_lightning.functional.statistics.Statistics] to a tensor of the
same shape. It declares in ``needs`` what has to be collected. A new score is one subclass, here or
in your own package; its name then works as a string too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional.statistics import Need, Statistics


class Score(ABC):
    """Base class of all scores."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """The statistics that the engine has to collect for this score."""

    @abstractmethod
    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Score every weight.

        Args:
            weight: ``W``, shape ``(out_features, in_features)``, float32 or float64.
            statistics: What was measured of the layer, with everything in ``needs``.

        Returns:
            ``S``, same shape and dtype; a weight with a higher score is kept longer.
        """


@dataclass(frozen=True)
class Magnitude(Score):
    """``S = |W|``. Needs no data.

    Example:
        >>> Magnitude()(torch.tensor([[-2.0, 1.0]]), Statistics()).tolist()
        [[2.0, 1.0]]
    """

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs()


@dataclass(frozen=True)
class Wanda(Score):
    """``S = |W| · ‖x_r‖``: Sun et al., arXiv 2306.11695, eq. 1.

    The norm is per token, which the paper's is not; the order within a layer is the same.

    Example:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[1.0, 4.0]])))
        >>> Wanda()(torch.tensor([[2.0, -1.0]]), statistics).tolist()
        [[2.0, 4.0]]
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"input"})

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs() * statistics.input_moments.norm.to(weight.dtype)


@dataclass(frozen=True)
class RI(Score):
    """``S = |W|/L1row_q + |W|/L1col_r``: relative importance, Zhang et al., ICLR 2024, eq. 3.

    A weight counts relative to its row and to its column, so that no channel is emptied. Needs no
    data.

    Example:
        >>> RI()(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), Statistics()).tolist()
        [[1.5, 0.75], [0.0, 1.75]]
    """

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return relative_importance(weight)


@dataclass(frozen=True)
class RIA(Score):
    """``S = RI · ‖x_r‖^α``: relative importance and activations, Zhang et al., ICLR 2024, eq. 4.

    Attributes:
        alpha: Exponent of the input norm. 0.5, the paper's choice, tempers outlier channels; 0 is
            [`RI`][symprune_lightning.functional.scores.RI].

    Example:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[4.0, 1.0]])))
        >>> RIA()(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), statistics).tolist()
        [[3.0, 0.75], [0.0, 1.75]]
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"input"})

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        norm = statistics.input_moments.norm.to(weight.dtype)
        return relative_importance(weight) * norm.pow(self.alpha)


def relative_importance(weight: Tensor) -> Tensor:
    """``|W|/L1row_q + |W|/L1col_r``, shape ``(out_features, in_features)``; 0 in an empty row."""
    magnitude = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny
    per_row = magnitude.sum(1, keepdim=True).clamp_min(tiny)
    per_column = magnitude.sum(0, keepdim=True).clamp_min(tiny)
    return magnitude / per_row + magnitude / per_column
