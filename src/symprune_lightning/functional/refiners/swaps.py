"""The swap loop that refiners of the mean error share, and the exact error of swaps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Candidate swaps of each row, best first, on two sides.

    Side 0 mends a positive mean error: it grows a weight with ``C > 0`` and prunes one with
    ``C < 0``. Side 1 is the other way round.

    Attributes:
        grown: Column of the weight to grow, ``(rows, 2, candidates)``.
        cut: Column of the weight to prune, same shape.
        count: How many of them there are, ``(rows, 2)``.
    """

    grown: Tensor
    cut: Tensor
    count: Tensor


def candidate_pairs(
    grow_key: Tensor,
    prune_key: Tensor,
    mask: Tensor,
    contribution: Tensor,
    most: int,
    span: int | None,
) -> Pairs:
    """Pairs by what the growing rule maximises and the pruning rule minimises.

    Args:
        grow_key: ``(rows, columns)``; the largest is grown first.
        prune_key: Same shape; the smallest is pruned first.
        mask: True = kept.
        contribution: ``C = W·mean``.
        most: Pairs on each side.
        span: Pairs stay inside groups of so many inputs; ``None`` for the whole row.
    """
    if span is None:
        return _row_pairs(grow_key, prune_key, mask, contribution, most)
    return _group_pairs(grow_key, prune_key, mask, contribution, most, span)


def _row_pairs(
    grow_key: Tensor, prune_key: Tensor, mask: Tensor, contribution: Tensor, most: int
) -> Pairs:
    """The best weight to grow with the best to prune, the second with the second, and so on."""
    positive, negative = contribution > 0, contribution < 0
    most = min(most, mask.shape[1])
    sides = []
    for grows, prunes in ((positive, negative), (negative, positive)):
        grown, grown_count = _first(grow_key.neg(), ~mask & grows, most)
        cut, cut_count = _first(prune_key, mask & prunes, most)
        sides.append((grown, cut, torch.minimum(grown_count, cut_count)))
    return Pairs(*(torch.stack(x, 1) for x in zip(*sides, strict=True)))


def _group_pairs(
    grow_key: Tensor, prune_key: Tensor, mask: Tensor, contribution: Tensor, most: int, span: int
) -> Pairs:
    """In each group of ``span`` inputs the best to grow with the best to prune; best grown first.

    A group may have a pair on either side; the second one may be out of date after the first.
    """
    rows, columns = mask.shape

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(-1, span)

    start = torch.arange(0, columns, span, device=mask.device)
    positive, negative = contribution > 0, contribution < 0
    most = min(most, len(start))
    sides = []
    for grows, prunes in ((positive, negative), (negative, positive)):
        grown, grown_count = _first(grouped(grow_key.neg()), grouped(~mask & grows), 1)
        cut, cut_count = _first(grouped(prune_key), grouped(mask & prunes), 1)
        both = ((grown_count > 0) & (cut_count > 0)).reshape(rows, -1)
        best = grouped(grow_key).gather(1, grown).reshape(rows, -1)
        order, count = _first(best.neg(), both, most)
        columns_of = (start + x.reshape(rows, -1) for x in (grown, cut))
        sides.append((*(x.gather(1, order) for x in columns_of), count))
    return Pairs(*(torch.stack(x, 1) for x in zip(*sides, strict=True)))


class ExactError:
    """``E_q = r G rᵀ`` with ``r = W_q`` where pruned, and how a swap changes it (SparseSwaps).

    Args:
        weight: Dense ``W``, ``(rows, columns)``.
        mask: True = kept.
        gram: ``G``, ``(columns, columns)``.
    """

    def __init__(self, weight: Tensor, mask: Tensor, gram: Tensor) -> None:
        self.weight = weight
        self.gram = gram.to(weight.dtype)
        self.product = weight.masked_fill(mask, 0) @ self.gram  # r G, kept up to date
        self._rows = torch.arange(len(weight), device=weight.device)

    def change(self, grown: Tensor, cut: Tensor) -> Tensor:
        """Change of each row's error by growing and pruning one column each, shape ``(rows,)``."""
        rows, gram = self._rows, self.gram
        w_grown, w_cut = self.weight[rows, grown], self.weight[rows, cut]
        alone = w_grown.square() * gram[grown, grown] + w_cut.square() * gram[cut, cut]
        pull = w_cut * self.product[rows, cut] - w_grown * self.product[rows, grown]
        return alone + 2 * pull - 2 * w_grown * w_cut * gram[grown, cut]

    def swap_(self, rows: Tensor, grown: Tensor, cut: Tensor) -> None:
        """Take a swap in the given rows; all three of shape ``(n,)``."""
        w_grown, w_cut = self.weight[rows, grown], self.weight[rows, cut]
        self.product[rows] += w_cut[:, None] * self.gram[cut] - w_grown[:, None] * self.gram[grown]


def swap_mean_error(
    mask: Tensor,
    pairs: Pairs,
    contribution: Tensor,
    *,
    cycles: int,
    threshold: float,
    same_sign: bool = False,
    lower_mean: bool = False,
    exact: ExactError | None = None,
) -> Tensor:
    """Take pairs in order while a row's mean error is above the threshold, all rows at once.

    A row is finished when its error is small enough, when it runs out of pairs, or at the first
    swap that changes the sign or fails to lower the mean error, where that is asked for. A pair
    that is out of date, or that would not lower the exact error, is passed over.

    Args:
        mask: True = kept.
        pairs: Candidates.
        contribution: ``C = W·mean``.
        cycles: Most pairs looked at in a row.
        threshold: Of ``|e_q|``, tested before a swap.
        same_sign: Forbid swaps that change the sign that ``e_q`` had at the start.
        lower_mean: Forbid swaps that don't lower ``|e_q|``.
        exact: Pass over swaps that don't lower the exact error.
    """
    mask = mask.clone()
    rows = torch.arange(len(mask), device=mask.device)
    error = contribution.masked_fill(mask, 0).sum(1)
    sign = error.sign()
    taken = torch.zeros_like(pairs.count)
    active = torch.ones_like(error, dtype=torch.bool)
    last = pairs.grown.shape[2] - 1
    for _ in range(cycles):
        side = (error < 0).long()
        turn = taken[rows, side]
        at = (rows, side, turn.clamp_max(last))
        grown, cut = pairs.grown[at], pairs.cut[at]
        after = error + contribution[rows, cut] - contribution[rows, grown]
        active &= (error.abs() > threshold) & (turn < pairs.count[rows, side])
        current = ~mask[rows, grown] & mask[rows, cut]
        if same_sign:
            active &= (after.sign() == sign) | ~current
        if lower_mean:
            active &= (after.abs() < error.abs()) | ~current
        if not active.any():
            break
        swapped = active & current
        if exact is not None:
            swapped &= exact.change(grown, cut) < 0
        mask[rows[swapped], grown[swapped]] = True
        mask[rows[swapped], cut[swapped]] = False
        if exact is not None:
            exact.swap_(rows[swapped], grown[swapped], cut[swapped])
        error = torch.where(swapped, after, error)
        taken[rows, side] += 1
    return mask


def _first(key: Tensor, eligible: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices of each row's ``most`` smallest eligible keys in order, and how many there are."""
    # an eligible key may be infinite itself (a constant channel): it stays ahead of the ineligible
    limits = torch.finfo(key.dtype)
    key = torch.where(eligible, key.clamp(limits.min, limits.max), torch.inf)
    return key.topk(most, dim=1, largest=False).indices, eligible.sum(1).clamp_max(most)
