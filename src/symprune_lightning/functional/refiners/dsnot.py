"""Swaps that lower the mean error: DSnoT and R²-DSnoT.

With ``C = W · mean``, the contribution of each weight to the mean output, the mean error of a row
is ``e_q = Σ_{pruned r} C[q,r] = E[dense − sparse output]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.refiners.swaps import (
    CYCLES_BETWEEN_CHECKS,
    ExactError,
    candidate_pairs,
    swap_mean_error,
)
from symprune_lightning.functional.registry import check_at_least
from symprune_lightning.functional.scores import relative_importance
from symprune_lightning.functional.statistics import Need, Statistics

THRESHOLD = 5e-5
"""Mean error per token below which a row is finished: DSnoT's 0.1 per sequence of 2048 tokens."""

Guard = Literal["mean", "gram"]
"""The error that every swap must lower: the mean error or the exact error."""


@dataclass(frozen=True)
class DSnoT(MaskRefiner):
    """Dynamic sparse no training: Zhang et al., arXiv 2310.08915, algorithm 1.

    Each cycle moves the mean error ``e_q`` of every row towards zero with one swap: grow the pruned
    weight with the largest ``sign(e)·C/var^p_var``, and prune the kept weight with the lowest Wanda
    score among those with ``sign(e)·C < 0``. A row is finished when ``|e_q| <= threshold`` or when
    it has no candidates left. (The reference code reads past the end of its list in the latter
    case, which changes the number of kept weights.)

    Attributes:
        cycles: ``T``, maximum number of swaps per output row. 50 as in the paper.
        threshold: ``ε``, mean error per token below which a row is finished. The paper's 0.1 is the
            error of a sum over a sequence: divide it by the sequence length.
        p_var: Exponent of the variance in the growing rule.
        same_sign: Finish a row before its error changes sign.
        reference: Use the variance within each sequence instead of the variance over all tokens,
            and for N:M the reference code's rule, to reproduce its masks.

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
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2310.08915"

    def __post_init__(self) -> None:
        check_at_least(0, cycles=self.cycles, threshold=self.threshold)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """See `MaskRefiner`."""
        return frozenset({"input", "sequence_variance"} if self.reference else {"input"})

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, window: int | None = None
    ) -> Tensor:
        """See `MaskRefiner`."""
        moments = statistics.input_moments
        variance = statistics.within_sequence_variance if self.reference else moments.variance
        grow_weights = _over_variance(moments.mean.abs(), variance, self.p_var)
        contribution = weight * moments.mean.to(weight.dtype)
        grow_key = weight.abs() * grow_weights.to(weight.dtype)
        prune_key = weight.abs() * moments.norm.to(weight.dtype)
        if self.reference and window is not None:
            return self._reference_groups(mask, contribution, grow_key, prune_key, window)
        return swap_mean_error(
            mask,
            candidate_pairs(grow_key, prune_key, mask, contribution, self.cycles, window),
            contribution,
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
        )

    def _reference_groups(
        self, mask: Tensor, contribution: Tensor, grow_key: Tensor, prune_key: Tensor, window: int
    ) -> Tensor:
        """Refine an N:M mask by the rule of the reference code.

        The weight to prune is the one with the lowest initial score in the group of the grown
        weight, regardless of its sign. Grown weights are not pruned again, and a row is finished
        before its error changes sign.
        """
        mask = mask.clone()
        rows = torch.arange(len(mask), device=mask.device)
        error = contribution.masked_fill(mask, 0).sum(1)
        sign = error.sign()
        # Kept weights are sorted as 0, and the sort is stable: both decide the order of ties, which
        # the golden masks of the reference code depend on.
        improvement = (grow_key * contribution.sign() * sign[:, None]).masked_fill(mask, 0)
        order = improvement.sort(dim=1, descending=True, stable=True).indices
        score = prune_key.masked_fill(~mask, torch.inf)
        active = torch.ones_like(error, dtype=torch.bool)
        for cycle in range(min(self.cycles, mask.shape[1])):
            grown = order[:, cycle]
            start = grown - grown % window
            group = start[:, None] + torch.arange(window, device=mask.device)
            pruned = start + score.gather(1, group).argmin(1)
            after = error + contribution[rows, pruned] - contribution[rows, grown]
            active &= (error.abs() > self.threshold) & (after.sign() == sign)
            # The reference code has no such test. Without it, a row without candidates would grow
            # kept weights, or prune from a group that has no kept weight left to prune.
            active &= (improvement[rows, grown] > 0) & score[rows, pruned].isfinite()
            mask[rows, grown] |= active
            mask[rows, pruned] &= ~active
            score[rows, pruned] = torch.where(active, torch.inf, score[rows, pruned])
            # rarely, since a GPU waits for the answer
            if cycle % CYCLES_BETWEEN_CHECKS == 0 and not active.any():
                break
            error = torch.where(active, after, error)
        return mask


@dataclass(frozen=True)
class R2DSnoT(MaskRefiner):
    """R²-DSnoT: DSnoT with relative importance and a regularised decision boundary.

    Yi & Richtárik, arXiv 2501.18980, section 4. This is our interpretation, since neither the
    paper's full text nor its code was available. With ``R = RI(W)`` and ``P = |W| / ‖W_q‖_p``:

    - grow: the pruned weight with ``sign(e)·C > 0`` and the largest
      ``(R if grow_relative else |W|) · |mean| / var^p_var + γ₁·P``;
    - prune: the kept weight with ``sign(e)·C < 0`` and the smallest
      ``(R if prune_relative else |W|) · ‖x_r‖^α + γ₂·P``.

    Without relative importance and with ``γ₁ = γ₂ = 0`` and ``α = 1`` it is [`DSnoT`]
    [symprune_lightning.functional.refiners.DSnoT]; with ``prune_relative`` and ``γ₂ = 0`` its
    pruning score is RIA. The arguments with the largest effect are ``guard``, ``prune_relative``
    and ``cycles``.

    Attributes:
        cycles: ``T``, maximum number of swaps per output row. 50 as in DSnoT.
        threshold: ``ε``, mean error per token below which a row is finished.
        alpha: ``α``, exponent of the input norm in the pruning rule.
        p_var: Exponent of the variance in the growing rule.
        gamma1: ``γ₁``, weight of the penalty in the growing rule.
        gamma2: ``γ₂``, weight of the penalty in the pruning rule.
        p: Norm of the penalty.
        grow_relative: Use relative importance in the growing rule.
        prune_relative: Use relative importance in the pruning rule, which then agrees with RIA. The
            paper finds that either of the two helps and that both together hurt.
        same_sign: Finish a row before its error changes sign.
        guard: ``None`` accepts every swap, as published; ``"mean"`` only swaps that lower
            ``|e_q|``; ``"gram"`` only swaps that lower the exact error ``r G rᵀ``, so that the
            layer's calibrated error never increases (needs the Gram matrix).

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
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

    def __post_init__(self) -> None:
        check_at_least(0, cycles=self.cycles, threshold=self.threshold)
        if self.gamma1 < 0 or self.gamma2 < 0:
            raise ValueError(
                f"gamma1={self.gamma1}, gamma2={self.gamma2}: a penalty must be at least 0"
            )
        if self.guard not in (None, *get_args(Guard)):
            raise ValueError(f"guard is {self.guard!r}; choose None, 'mean' or 'gram'")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """See `MaskRefiner`."""
        return frozenset({"input", "gram"} if self.guard == "gram" else {"input"})

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, window: int | None = None
    ) -> Tensor:
        """See `MaskRefiner`."""
        contribution = weight * statistics.input_moments.mean.to(weight.dtype)
        grow_key, prune_key = self._keys(weight, statistics)
        exact = None
        if self.guard == "gram":
            exact = ExactError(weight, mask, statistics.gram_matrix)
        return swap_mean_error(
            mask,
            candidate_pairs(grow_key, prune_key, mask, contribution, self.cycles, window),
            contribution,
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
            lower_mean=self.guard == "mean",
            exact=exact,
        )

    def _keys(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Return the keys that the growing rule maximises and the pruning rule minimises."""
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
    """Return ``x / variance^power``, very large for constant channels; finite in float32.

    Infinity would make the key of a weight that is zero NaN.
    """
    limits = torch.finfo(torch.float32)
    return (x / variance.pow(power).clamp_min(limits.tiny)).clamp_max(limits.max)
