"""Layer solvers: methods that choose the mask and the new weights of a layer together.

A solver takes the place of score, refiner and weight update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional import obs
from symprune_lightning.functional.patterns import NM, Pattern, Unstructured, keep_highest
from symprune_lightning.functional.statistics import Need, Statistics


class LayerSolver(ABC):
    """Base class of all layer solvers."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    """Statistics that the engine collects for this solver."""

    reference_url: ClassVar[str] = ""
    """Address of the paper, empty without one."""

    @abstractmethod
    def __call__(
        self, weight: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Prune a layer.

        With group ``"output"`` or an N:M pattern, rows are independent of each other and ranks
        share them. With any other group, `weight` is the whole matrix.

        Args:
            weight: Dense ``W``, ``(out_features, in_features)``, float32 or float64, or a subset of
                its rows. Not modified.
            statistics: Statistics of the layer, with everything in ``needs``.
            pattern: The budget of every group.

        Returns:
            New weights, zero where pruned, and their bool mask, True = kept; both of the shape of
            `weight`. Weights that are zero in the dense layer count as pruned.

        Raises:
            ValueError: The shape cannot have this pattern.
        """


@dataclass(frozen=True)
class SparseGPT(LayerSolver):
    """SparseGPT: a column sweep that chooses its mask on the way.

    Frantar & Alistarh, arXiv 2301.00774. Weights compete by ``W²/d²``, where ``W`` includes all
    updates so far and ``d`` is the diagonal of the Cholesky factor, in blocks of 128 columns or in
    the groups of an N:M pattern. Published with group ``"layer"``: all rows of a block compete.

    Attributes:
        damping: ``λ``, 0.01 as in the paper; raised as in
            [`OBSUpdate`][symprune_lightning.functional.update.OBSUpdate].

    Examples:
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 0.6]])
        >>> statistics = Statistics(gram=(x.T @ x / 3).double())
        >>> weight, mask = SparseGPT()(torch.ones(1, 2), statistics, Unstructured(0.5))
        >>> mask.tolist(), round(weight[0, 1].item(), 1)
        ([[False, True]], 2.0)
    """

    damping: float = 0.01
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2301.00774"

    def __call__(
        self, weight: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See `LayerSolver`."""
        pattern.check(weight.shape)
        factor = obs.inverse_factor(statistics, self.damping, weight.dtype)
        diagonal = factor.diagonal()

        def choose(columns: Tensor, start: int, stop: int) -> Tensor:
            score = columns.square() / diagonal[start:stop].square()
            return _partial_mask(pattern, score.masked_fill(columns == 0, -torch.inf), start, stop)

        every = pattern.m if isinstance(pattern, NM) else obs.BLOCK
        return obs.sweep(weight, factor, choose, every)


def _partial_mask(pattern: Pattern, score: Tensor, start: int, stop: int) -> Tensor:
    """Mask columns ``start`` to ``stop`` so that all columns together meet the budget."""
    if not isinstance(pattern, Unstructured) or pattern.group == "input":
        return pattern.mask(score)  # groups lie within the columns
    grouped = pattern.groups(score)
    weights_per_column = grouped.shape[1] // (stop - start)  # in each group
    # A difference of cumulative counts: rounding each part down would prune too few in total.
    before, after = (pattern.num_pruned(weights_per_column * column) for column in (start, stop))
    return pattern.ungroup(keep_highest(grouped, after - before), score.shape)
