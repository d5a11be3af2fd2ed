"""Weight updates: kept weights are changed to make up for those that are pruned.

Off by default: methods of masks alone promise that kept weights stay as they are.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional.patterns import NM, Pattern, Unstructured, keep_highest
from symprune_lightning.functional.statistics import Need, Statistics

BLOCK = 128
"""Columns whose updates are gathered before they reach the columns behind them."""

Chooser = Callable[[Tensor, int, int], Tensor]


class WeightUpdate(ABC):
    """Base class of all weight updates."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    """The statistics that the engine has to collect for this update."""

    chooses_mask: ClassVar[bool] = False
    """Whether the update makes a mask of its own, so that no score or refiner is run."""

    @abstractmethod
    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Change the kept weights.

        Args:
            weight: Dense ``W``, ``(out_features, in_features)``, float32 or float64. Not changed.
            mask: Bool, same shape, True = kept; all True for an update that chooses its own.
            statistics: What was measured of the layer, with everything in ``needs``.
            pattern: The budget, for an update that chooses its own mask.

        Returns:
            New weights, zero where pruned, and the mask.
        """


@dataclass(frozen=True)
class OBSUpdate(WeightUpdate):
    """SparseGPT's column sweep for a fixed mask: Frantar & Alistarh, arXiv 2301.00774, alg. 1.

    Going through the columns from left to right, the error of each pruned weight is made up for by
    the weights behind it, by the inverse of ``G + λ·mean(diag G)·I``.

    Attributes:
        damping: ``λ``, as in the paper. Where the matrix can't be factored it is raised tenfold
            until it can, with a warning.

    Examples:
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 0.6]])
        >>> statistics = Statistics(gram=(x.T @ x / 3).double())
        >>> mask = torch.tensor([[False, True]])
        >>> weight, _ = OBSUpdate()(torch.ones(1, 2), mask, statistics, Unstructured(0.5))
        >>> weight[0, 0].item(), round(weight[0, 1].item(), 1)
        (0.0, 2.0)
    """

    damping: float = 0.01

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See `WeightUpdate`."""
        factor = inverse_factor(statistics, self.damping, weight.dtype)
        return _sweep(weight, mask, factor, choose=None, every=BLOCK)


@dataclass(frozen=True)
class SparseGPT(WeightUpdate):
    """SparseGPT: the sweep of `OBSUpdate` that chooses its own mask on the way.

    Frantar & Alistarh, arXiv 2301.00774. Weights compete by ``W²/d²`` (d the diagonal of the
    factor) as they stand when the sweep comes to them: in blocks of 128 columns, or in the groups
    of an N:M pattern. Published with group ``"layer"``: all rows of a block compete.

    Attributes:
        damping: See `OBSUpdate`.

    Examples:
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 0.6]])
        >>> statistics = Statistics(gram=(x.T @ x / 3).double())
        >>> kept = torch.ones(1, 2, dtype=torch.bool)
        >>> SparseGPT()(torch.ones(1, 2), kept, statistics, Unstructured(0.5))[1].tolist()
        [[False, True]]
    """

    damping: float = 0.01
    chooses_mask: ClassVar[bool] = True

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See `WeightUpdate`."""
        factor = inverse_factor(statistics, self.damping, weight.dtype)
        diagonal = factor.diagonal()

        def choose(columns: Tensor, start: int, stop: int) -> Tensor:
            score = columns.square() / diagonal[start:stop].square()
            return _part_mask(pattern, score.masked_fill(columns == 0, -torch.inf), start, stop)

        every = pattern.m if isinstance(pattern, NM) else BLOCK
        return _sweep(weight, mask, factor, choose, every)


def inverse_factor(statistics: Statistics, damping: float, dtype: torch.dtype) -> Tensor:
    """Upper Cholesky factor of ``(G + λ·mean(diag G)·I)⁻¹``, ``(in_features, in_features)``.

    Raises:
        ValueError: No damping up to 10⁴ helps; the Gram matrix is not finite.
    """
    gram = statistics.gram_matrix.to(dtype)
    scale = gram.diagonal().mean().clamp_min(torch.finfo(dtype).tiny)
    identity = torch.eye(len(gram), dtype=dtype, device=gram.device)
    tried = damping
    while tried <= 1e4:
        lower, failed = torch.linalg.cholesky_ex(gram + tried * scale * identity)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            assert isinstance(factor, Tensor)
            if tried > damping:
                warnings.warn(
                    f"layer {statistics.layer}: the Gram matrix can't be factored with damping "
                    f"{damping:g}; {tried:g} was used (more calibration tokens may help)",
                    stacklevel=3,
                )
            return factor
        tried = max(tried * 10, 1e-6)
    raise ValueError(f"the Gram matrix of layer {statistics.layer} can't be factored at all")


def _sweep(
    weight: Tensor, mask: Tensor, factor: Tensor, choose: Chooser | None, every: int
) -> tuple[Tensor, Tensor]:
    """Zero the pruned weights column by column, passing each error on to the columns behind.

    ``choose`` makes the mask of the next ``every`` columns from their weights as they now are.
    """
    weight, mask = weight.clone(), mask.clone()
    zero = weight == 0
    columns = weight.shape[1]
    size = BLOCK - BLOCK % every if every < BLOCK else every
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block, inner = weight[:, start:stop], factor[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            if choose is not None and i % every == 0:
                end = min(i + every, stop - start)
                mask[:, start + i : start + end] = choose(block[:, i:end], start + i, start + end)
            kept = mask[:, start + i] & ~zero[:, start + i]
            errors[:, i] = block[:, i].masked_fill(kept, 0) / inner[i, i]
            block[:, i + 1 :] -= errors[:, i, None] * inner[i, i + 1 :]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    mask &= ~zero
    return weight.masked_fill_(~mask, 0), mask


def _part_mask(pattern: Pattern, score: Tensor, start: int, stop: int) -> Tensor:
    """Mask of some columns, such that the parts of all columns meet the pattern's budget."""
    if not isinstance(pattern, Unstructured) or pattern.group == "input":
        return pattern.mask(score)
    grouped = pattern.groups(score)
    unit = grouped.shape[1] // (stop - start)  # weights that one column adds to a group
    pruned = pattern.pruned(unit * stop) - pattern.pruned(unit * start)
    return pattern.ungroup(keep_highest(grouped, pruned), score.shape)
