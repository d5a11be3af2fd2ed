"""Refiners: better masks at the same budget, without training.

A refiner swaps weights inside rows: one that was pruned is grown, one that was kept is pruned. The
number of kept weights of every row is the same before and after, whatever the weights and the
statistics. It looks at dense weights, so it runs before a mask is applied.

With ``C = W · mean`` (what each weight adds to the mean output), a row's mean error is
``e_q = Σ_{pruned r} C[q,r] = E[dense − sparse output]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from symprune_lightning.functional.scores import relative_importance
from symprune_lightning.functional.statistics import Need, Statistics

THRESHOLD = 5e-5
"""Mean error per token under which a row is left alone: DSnoT's 0.1 over sequences of 2048."""


class MaskRefiner(ABC):
    """Base class of all refiners."""

    needs: ClassVar[frozenset[Need]] = frozenset({"input"})
    """The statistics that the engine has to collect for this refiner."""

    @abstractmethod
    def __call__(self, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
        """Improve a mask.

        Args:
            weight: Dense ``W``, shape ``(out_features, in_features)``, float32 or float64.
            mask: Bool, same shape, True = kept. Not changed.
            statistics: What was measured of the layer, with everything in ``needs``.

        Returns:
            A new mask with the same number of kept weights in every row.
        """


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

    Example:
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

    def __call__(self, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
        """See `MaskRefiner`."""
        moments = statistics.input_moments
        variance = statistics.sequence_variance if self.reference else moments.variance
        assert variance is not None, "declared in `needs`"
        grow_weights = _over_variance(moments.mean.abs(), variance, self.p_var)
        return _swap(
            mask,
            contribution=weight * moments.mean.to(weight.dtype),
            grow_key=weight.abs() * grow_weights.to(weight.dtype),
            prune_key=weight.abs() * moments.norm.to(weight.dtype),
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
        )


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
        guard: ``None`` accepts every swap, as published; ``"mean"`` only a swap that lowers
            ``|e_q|``.

    Raises:
        ValueError: A penalty is negative or the guard unknown.

    Example:
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
    guard: Literal["mean"] | None = None

    def __post_init__(self) -> None:
        if self.gamma1 < 0 or self.gamma2 < 0:
            raise ValueError(f"gamma1={self.gamma1}, gamma2={self.gamma2}: a penalty is at least 0")
        if self.guard not in (None, "mean"):
            raise ValueError(f"guard is {self.guard!r}; choose None or 'mean'")

    def __call__(self, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
        """See `MaskRefiner`."""
        moments, dtype = statistics.input_moments, weight.dtype
        magnitude = weight.abs()
        relative = relative_importance(weight)
        row_norm = magnitude.norm(self.p, dim=1, keepdim=True)
        penalty = magnitude / row_norm.clamp_min(torch.finfo(dtype).tiny)
        growing = relative if self.grow_relative else magnitude
        pruning = relative if self.prune_relative else magnitude
        grow_weights = _over_variance(moments.mean.abs(), moments.variance, self.p_var)
        return _swap(
            mask,
            contribution=weight * moments.mean.to(dtype),
            grow_key=growing * grow_weights.to(dtype) + self.gamma1 * penalty,
            prune_key=pruning * moments.norm.to(dtype).pow(self.alpha) + self.gamma2 * penalty,
            cycles=self.cycles,
            threshold=self.threshold,
            same_sign=self.same_sign,
            lower_mean=self.guard == "mean",
        )


def _over_variance(x: Tensor, variance: Tensor, power: float) -> Tensor:
    """``x / variance^power`` with constant channels first in line and no NaN."""
    return x / variance.pow(power).clamp_min(torch.finfo(torch.float32).tiny)


def _swap(
    mask: Tensor,
    *,
    contribution: Tensor,
    grow_key: Tensor,
    prune_key: Tensor,
    cycles: int,
    threshold: float,
    same_sign: bool,
    lower_mean: bool = False,
) -> Tensor:
    """The swap loop of DSnoT, for all rows at once.

    Candidates are fixed at the start and taken in order. They fall into two sides, by the sign of
    the error that they mend: side 0 (``e > 0``) grows weights with ``C > 0`` and prunes those with
    ``C < 0``, side 1 the other way. The sides share no weight, so none is ever swapped twice.
    """
    positive, negative = contribution > 0, contribution < 0
    pruned = ~mask
    most = min(cycles, mask.shape[1])
    grow = [_first(grow_key.neg(), pruned & side, most) for side in (positive, negative)]
    prune = [_first(prune_key, mask & side, most) for side in (negative, positive)]
    grow_index, grow_count = (torch.stack(x, 1) for x in zip(*grow, strict=True))
    prune_index, prune_count = (torch.stack(x, 1) for x in zip(*prune, strict=True))

    mask = mask.clone()
    rows = torch.arange(len(mask), device=mask.device)
    error = (contribution * pruned).sum(1)
    sign = error.sign()
    taken = torch.zeros_like(grow_count)  # candidates taken so far on each side
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        side = (error < 0).long()
        turn = taken[rows, side]
        last = torch.minimum(grow_count[rows, side], prune_count[rows, side]) - 1
        position = turn.clamp_max(most - 1)
        grown, cut = grow_index[rows, side, position], prune_index[rows, side, position]
        after = error + contribution[rows, cut] - contribution[rows, grown]
        active &= (error.abs() > threshold) & (turn <= last)
        if same_sign:
            active &= after.sign() == sign
        if lower_mean:
            active &= after.abs() < error.abs()
        if not active.any():
            break
        mask[rows[active], grown[active]] = True
        mask[rows[active], cut[active]] = False
        error = torch.where(active, after, error)
        taken[rows, side] += 1
    return mask


def _first(key: Tensor, eligible: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices of each row's ``most`` smallest eligible keys in order, and how many there are."""
    # an eligible key may be infinite itself (a constant channel): it stays ahead of the ineligible
    limits = torch.finfo(key.dtype)
    key = torch.where(eligible, key.clamp(limits.min, limits.max), torch.inf)
    return key.topk(most, dim=1, largest=False).indices, eligible.sum(1).clamp_max(most)
