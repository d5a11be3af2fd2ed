"""Swaps that lower the mean error: DSnoT and R²-DSnoT.

With ``C = W · mean`` (what each weight adds to the mean output), a row's mean error is
``e_q = Σ_{pruned r} C[q,r] = E[dense − sparse output]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.refiners.swaps import (
    ExactError,
    candidate_pairs,
    swap_mean_error,
)
from symprune_lightning.functional.scores import relative_importance
from symprune_lightning.functional.statistics import Need, Statistics

THRESHOLD = 5e-5
"""Mean error per token under which a row is left alone: DSnoT's 0.1 over sequences of 2048."""

Guard = Literal["mean", "gram"]
"""Which swaps to forbid: those that don't lower the mean error, or the exact error."""


@dataclass(frozen=True)
class DSnoT(MaskRefiner):
    """Dynamic sparse no training: Zhang et al., arXiv 2310.08915, algorithm 1.

    Each cycle moves every row's mean error ``e_q`` towards zero with one swap. The weight grown is
    the pruned one with the largest ``sign(e)·C/var^p_var``; the weight pruned is the kept one with
    the lowest Wanda score among those with ``sign(e)·C < 0``. A row is finished once
    ``|e_q| <= threshold``, or when it runs out of candidates (the reference code reads past the
    end of its list there, and loses the row's budget).

    Attributes:
        cycles: ``T``, most swaps in a row. 50 as in the paper.
        threshold: ``ε``, per token. The paper's 0.1 is of a sum over a sequence: divide it by the
            sequence length.
        p_var: Exponent of the variance in the growing rule.
        same_sign: Stop a row before its error changes sign.
        reference: Measure the variance as the reference code does (inside each sequence, not over
            all tokens), to reproduce its masks.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[1.0, 1, 1, 1], [2, 1, 1, 2]])))
        >>> weight = torch.tensor([[0.5, 1.0, -0.6, 1.0]])
        >>> mask = torch.tensor([[False, True, True, True]])
        >>> DSnoT()(weight, mask, statistics).int().tolist()
        [[1, 1, 0, 1]]
    """

    cycles: int = 50
    threshold: float = THRESHOLD
    p_var: float = 1.0
    same_sign: bool = False
    reference: bool = False

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """See `MaskRefiner`."""
        return frozenset({"input", "sequence_variance"} if self.reference else {"input"})

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, span: int | None = None
    ) -> Tensor:
        """See `MaskRefiner`."""
        moments = statistics.input_moments
        variance = statistics.sequence_variance if self.reference else moments.variance
        assert variance is not None, "declared in `needs`"
        grow_weights = _over_variance(moments.mean.abs(), variance, self.p_var)
        contribution = weight * moments.mean.to(weight.dtype)
        grow_key = weight.abs() * grow_weights.to(weight.dtype)
        prune_key = weight.abs() * moments.norm.to(weight.dtype)
        if self.reference and span is not None:
            return self._reference_groups(mask, contribution, grow_key, prune_key, span)
        return swap_mean_error(
            mask,
            candidate_pairs(grow_key, prune_key, mask, contribution, self.cycles, span),
            contribution,
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
        )

    def _reference_groups(
        self, mask: Tensor, contribution: Tensor, grow_key: Tensor, prune_key: Tensor, span: int
    ) -> Tensor:
        """The reference code's rule for N:M.

        The weight to prune is the one of lowest score in the grown one's group, whatever its sign;
        none is pruned that was grown, and no swap may change the sign of the error.
        """
        mask = mask.clone()
        rows = torch.arange(len(mask), device=mask.device)
        error = contribution.masked_fill(mask, 0).sum(1)
        sign = error.sign()
        # pruned weights by what they mend; the others count as 0 and come after them
        mending = (grow_key * contribution.sign() * sign[:, None]).masked_fill(mask, 0)
        order = mending.sort(dim=1, descending=True, stable=True).indices
        score = prune_key.masked_fill(~mask, torch.inf)
        active = torch.ones_like(error, dtype=torch.bool)
        for cycle in range(min(self.cycles, mask.shape[1])):
            grown = order[:, cycle]
            start = grown - grown % span
            group = start[:, None] + torch.arange(span, device=mask.device)
            cut = start + score.gather(1, group).argmin(1)
            after = error + contribution[rows, cut] - contribution[rows, grown]
            active &= (error.abs() > self.threshold) & (after.sign() == sign)
            active &= (mending[rows, grown] > 0) & score[rows, cut].isfinite()
            if not active.any():
                break
            mask[rows[active], grown[active]] = True
            mask[rows[active], cut[active]] = False
            score[rows[active], cut[active]] = torch.inf
            error = torch.where(active, after, error)
        return mask


@dataclass(frozen=True)
class R2DSnoT(MaskRefiner):
    """R²-DSnoT: DSnoT with relative importance and a regularised decision boundary.

    Yi & Richtárik, arXiv 2501.18980, section 4; our reading of it, since neither the paper's full
    text nor its code could be consulted. With ``R = RI(W)`` and ``P = |W| / ‖W_q‖_p``:

    - grow: the pruned weight with ``sign(e)·C > 0`` and the largest
      ``(R if grow_relative else |W|) · |mean| / var^p_var + γ₁·P``;
    - prune: the kept weight with ``sign(e)·C < 0`` and the smallest
      ``(R if prune_relative else |W|) · ‖x_r‖^α + γ₂·P``.

    With both switches off, ``γ₁ = γ₂ = 0`` and ``α = 1`` it is [`DSnoT`]
    [symprune_lightning.functional.refiners.DSnoT]; with ``prune_relative`` and ``γ₂ = 0`` its
    pruning score is RIA.

    Attributes:
        cycles: ``T``, most swaps in a row.
        threshold: ``ε``, mean error per token under which a row is finished.
        alpha: ``α``, exponent of the input norm in the pruning rule.
        p_var: Exponent of the variance in the growing rule.
        gamma1: ``γ₁``, weight of the penalty in the growing rule.
        gamma2: ``γ₂``, weight of the penalty in the pruning rule.
        p: Norm of the penalty.
        grow_relative: Grow by relative importance.
        prune_relative: Prune by relative importance. The paper finds that either switch helps and
            both together hurt; this one on makes the rule agree with RIA.
        same_sign: Stop a row before its error changes sign.
        guard: ``None`` accepts every swap, as published; ``"mean"`` only one that lowers
            ``|e_q|``; ``"gram"`` only one that lowers the exact error ``r G rᵀ``, so that the
            layer's calibrated error can only fall (needs the Gram matrix).

    Raises:
        ValueError: A penalty is negative or the guard unknown.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[1.0, 1, 1, 1], [2, 1, 1, 2]])))
        >>> weight = torch.tensor([[0.5, 1.0, -0.6, 1.0]])
        >>> mask = torch.tensor([[False, True, True, True]])
        >>> R2DSnoT()(weight, mask, statistics).int().tolist()
        [[1, 1, 0, 1]]
    """

    cycles: int = 50
    threshold: float = THRESHOLD
    alpha: float = 0.5
    p_var: float = 1.0
    gamma1: float = 0.0
    gamma2: float = 1e-4
    p: float = 2.0
    grow_relative: bool = False
    prune_relative: bool = True
    same_sign: bool = False
    guard: Guard | None = None

    def __post_init__(self) -> None:
        if self.gamma1 < 0 or self.gamma2 < 0:
            raise ValueError(f"gamma1={self.gamma1}, gamma2={self.gamma2}: a penalty is at least 0")
        if self.guard not in (None, *get_args(Guard)):
            raise ValueError(f"guard is {self.guard!r}; choose None, 'mean' or 'gram'")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """See `MaskRefiner`."""
        return frozenset({"input", "gram"} if self.guard == "gram" else {"input"})

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, span: int | None = None
    ) -> Tensor:
        """See `MaskRefiner`."""
        contribution = weight * statistics.input_moments.mean.to(weight.dtype)
        grow_key, prune_key = self._keys(weight, statistics)
        exact = None
        if self.guard == "gram":
            exact = ExactError(weight, mask, statistics.gram_matrix)
        return swap_mean_error(
            mask,
            candidate_pairs(grow_key, prune_key, mask, contribution, self.cycles, span),
            contribution,
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
            lower_mean=self.guard == "mean",
            exact=exact,
        )

    def _keys(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """What the growing rule maximises and what the pruning rule minimises."""
        moments, dtype = statistics.input_moments, weight.dtype
        magnitude = weight.abs()
        relative = relative_importance(weight, column_norm=statistics.column_sum)
        row_norm = magnitude.norm(self.p, dim=1, keepdim=True)
        penalty = magnitude / row_norm.clamp_min(torch.finfo(dtype).tiny)
        growing = relative if self.grow_relative else magnitude
        pruning = relative if self.prune_relative else magnitude
        grow_weights = _over_variance(moments.mean.abs(), moments.variance, self.p_var)
        grow_key = growing * grow_weights.to(dtype) + self.gamma1 * penalty
        prune_key = pruning * moments.norm.to(dtype).pow(self.alpha) + self.gamma2 * penalty
        return grow_key, prune_key


def _over_variance(x: Tensor, variance: Tensor, power: float) -> Tensor:
    """``x / variance^power`` with constant channels first in line and no NaN."""
    return x / variance.pow(power).clamp_min(torch.finfo(torch.float32).tiny)
