"""Layer solvers: methods that choose the mask and the new weights of a layer together.

A solver takes the place of score, refiner and weight update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional import obs
from symprune_lightning.functional.cg import masked_cg
from symprune_lightning.functional.patterns import NM, Pattern, Unstructured, keep_highest
from symprune_lightning.functional.registry import check_at_least
from symprune_lightning.functional.schedule import cubic_growth
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

    def __post_init__(self) -> None:
        check_at_least(0, damping=self.damping)

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


@dataclass(frozen=True)
class ADMM(LayerSolver):
    """Mask and weights by alternating directions: Boža, arXiv 2401.02938.

    With inputs scaled to unit norm and ``G`` damped, iterates between the least-squares weights
    ``V`` and their projection ``Z`` on the budget: ``Z = (V + U) ∘ M`` with the largest ``|V + U|``
    kept, ``U ← U + V − Z``, ``V ← (W G + ρ(Z − U)) (G + ρI)⁻¹``. In scaled units ``|V|`` is Wanda's
    score, so the first mask is Wanda's. The sparsity grows to its target over the first iterations
    by the cubic schedule, as in the paper (the published code starts at the target). At the end,
    conjugate gradients polish the weights, and a row whose exact error is not below that of Wanda's
    mask keeps the latter with the dense weights.

    Attributes:
        iterations: Number of iterations.
        schedule: Iterations over which the sparsity grows; not used for N:M.
        rho: ``ρ``, penalty for the distance between ``V`` and ``Z``.
        damping: Added to the diagonal of the scaled ``G``, relative to its mean.
        steps: Conjugate gradient steps at the end.

    Raises:
        ValueError: ``schedule`` is not between 1 and ``iterations``.

    Examples:
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 0.6]])
        >>> statistics = Statistics(gram=(x.T @ x / 3).double())
        >>> weight, mask = ADMM()(torch.tensor([[1.0, 2.0]]), statistics, Unstructured(0.5))
        >>> mask.tolist(), round(weight[0, 1].item(), 1)
        ([[False, True]], 3.0)
    """

    iterations: int = 20
    schedule: int = 15
    rho: float = 1.0
    damping: float = 0.1
    steps: int = 10
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2401.02938"

    def __post_init__(self) -> None:
        check_at_least(0, damping=self.damping)
        if not 1 <= self.schedule <= self.iterations:
            raise ValueError(f"schedule is {self.schedule}; it must be 1 to {self.iterations}")

    def __call__(
        self, weight: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """See `LayerSolver`."""
        pattern.check(weight.shape)
        # float64: twenty projections amplify rounding, on which masks would depend otherwise, and
        # with it on how rows are divided among ranks
        dtype, weight = weight.dtype, weight.double()
        gram = statistics.gram_matrix
        scale = gram.diagonal().sqrt()
        scale = scale.clamp_min(scale.max() * 1e-6).clamp_min(torch.finfo(gram.dtype).tiny)
        unit_gram = gram / scale[:, None] / scale
        wanda = self._mask(weight * scale, weight == 0, pattern)
        mask = self._iterate(weight * scale, unit_gram, weight == 0, pattern)
        start = weight.masked_fill(~mask, 0)
        solved = masked_cg(weight, start, mask, gram, self.steps, tolerance=1e-6)
        error, wanda_error = (
            statistics.squared_error(weight - x) for x in (solved, weight.masked_fill(~wanda, 0))
        )
        if pattern.group == "output":  # elsewhere rows compete, and cannot be exchanged
            worse = (error >= wanda_error)[:, None]
            mask = torch.where(worse, wanda, mask)
            solved = torch.where(worse, weight.masked_fill(~wanda, 0), solved)
        return solved.to(dtype), mask

    def _iterate(self, weight: Tensor, gram: Tensor, zero: Tensor, pattern: Pattern) -> Tensor:
        """Return the mask after all iterations, in scaled units."""
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        damped = gram + self.damping * gram.diagonal().mean() * identity
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped + self.rho * identity))
        target = weight @ damped
        dual, primal = torch.zeros_like(weight), weight
        mask = ~zero
        for i in range(self.iterations):
            budget = pattern
            if isinstance(pattern, Unstructured) and i + 1 < self.schedule:
                fraction = cubic_growth((i + 1) / self.schedule)
                budget = replace(pattern, sparsity=pattern.sparsity * fraction)
            mask = self._mask(primal + dual, zero, budget)
            projected = (primal + dual) * mask
            dual = dual + primal - projected
            primal = (target + self.rho * (projected - dual)) @ inverse
        return mask

    @staticmethod
    def _mask(values: Tensor, zero: Tensor, pattern: Pattern) -> Tensor:
        """Keep the largest magnitudes; weights that are zero in the dense layer are pruned."""
        return pattern.mask(values.abs().masked_fill(zero, -torch.inf)) & ~zero


def _partial_mask(pattern: Pattern, score: Tensor, start: int, stop: int) -> Tensor:
    """Mask columns ``start`` to ``stop`` so that all columns together meet the budget."""
    if not isinstance(pattern, Unstructured) or pattern.group == "input":
        return pattern.mask(score)  # groups lie within the columns
    grouped = pattern.groups(score)
    weights_per_column = grouped.shape[1] // (stop - start)  # in each group
    # A difference of cumulative counts: rounding each part down would prune too few in total.
    before, after = (pattern.num_pruned(weights_per_column * column) for column in (start, stop))
    return pattern.ungroup(keep_highest(grouped, after - before), score.shape)
