"""Swaps that lower the exact calibrated error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.statistics import Need, Statistics

CHUNK = 2**20
"""Weights that are refined together: bounds what a layer with many rows takes in memory."""

SHORTLIST = 16
"""Weights to grow, and weights to prune, of which all pairs are looked at (N:M: groups)."""

SWAPS = 16
"""Most swaps that are taken in a row before its shortlist is made anew."""


@dataclass(frozen=True)
class ExactSwap(MaskRefiner):
    """Swaps by the exact calibrated error: SparseSwaps, arXiv 2512.10922.

    The error of row q is ``E_q = r G rᵀ`` with ``r = W_q`` where pruned and 0 elsewhere. A swap is
    taken only if it lowers ``E_q``, so the error can only fall, and a row is finished when no swap
    on its shortlist does.

    Where we depart from the paper, which looks at all pairs before every swap: the 16 weights whose
    growing alone costs least and the 16 whose pruning alone costs least make a shortlist; of its
    256 pairs the best is taken, with costs kept exact, up to 16 times, and then a new shortlist is
    made. For N:M, the shortlist are the 16 groups with the best pair of their own.

    Attributes:
        cycles: ``T``, most swaps in a row.

    Examples:
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
        >>> statistics = Statistics(gram=(x.T @ x / 2).double())
        >>> mask = torch.tensor([[True, False, False]])
        >>> ExactSwap()(torch.tensor([[1.0, 1.5, 1.0]]), mask, statistics).tolist()
        [[False, True, False]]
    """

    cycles: int = 50
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, span: int | None = None
    ) -> Tensor:
        """See `MaskRefiner`."""
        gram = statistics.gram_matrix.to(weight.dtype)
        size = max(1, CHUNK // weight.shape[1])
        refined = mask.clone()
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            self._refine_(refined[rows], weight[rows], gram, span)
        return refined

    def _refine_(self, mask: Tensor, weight: Tensor, gram: Tensor, span: int | None) -> None:
        """Refine the mask of some rows in place; rows that are finished are left out."""
        rows = torch.arange(len(mask), device=mask.device)
        left = torch.full_like(rows, self.cycles)
        while len(rows):
            state = _Rows(weight[rows], mask[rows], gram)
            taken = state.swap_in_rows_(left) if span is None else state.swap_in_groups_(left, span)
            mask[rows] = state.mask
            left = left - taken
            going_on = (taken > 0) & (left > 0)
            rows, left = rows[going_on], left[going_on]


class _Rows:
    """Some rows and what moves in them cost.

    ``cost`` is the change of ``E_q`` if that weight alone changes sides,
    ``W_r² G_rr ± 2 W_r (rG)_r``: + where kept and − where pruned. If g is grown and p pruned, it is
    ``cost_g + cost_p − 2 W_g W_p G_gp``.
    """

    def __init__(self, weight: Tensor, mask: Tensor, gram: Tensor) -> None:
        # arithmetic with 0 and 1 in place of torch.where, which is several times slower
        kept = mask.to(weight.dtype)
        removed = torch.addcmul(weight, weight, kept, value=-1)
        product = removed @ gram
        own = weight.square() * gram.diagonal()
        own.masked_fill_(weight == 0, torch.inf)  # a weight that is zero already stays pruned
        self.cost = own.addcmul_(weight * product, kept * 2 - 1, value=2)
        self.weight, self.mask, self.gram, self.kept = weight, mask, gram, kept
        self.error = (product * removed).sum(1)
        self.all = torch.arange(len(weight), device=weight.device)

    def swap_in_rows_(self, most: Tensor) -> Tensor:
        """Take swaps from the shortlists; returns how many in each row, ``most`` at most."""
        size = min(SHORTLIST, self.weight.shape[1])
        never = torch.finfo(self.cost.dtype).max / 4
        grow = torch.add(self.cost, self.kept, alpha=never).topk(size, 1, largest=False)
        cut = torch.add(self.cost, 1 - self.kept, alpha=never).topk(size, 1, largest=False)
        together = self._together(torch.cat([grow.indices, cut.indices], 1))
        grow_cost, cut_cost = grow.values, cut.values
        taken = torch.zeros_like(most)
        for _ in range(SWAPS):
            pairs = grow_cost[:, :, None] + cut_cost[:, None, :] - together[:, :size, size:]
            change, at = pairs.flatten(1).min(1)
            i, j = at // size, at % size
            go = self._accept_(
                change, taken, most, grow.indices[self.all, i], cut.indices[self.all, j]
            )
            if not len(go):
                break
            i, j = i[go], j[go]
            step = together[go, :, size + j] - together[go, :, i]
            grow_cost[go] -= step[:, :size]
            cut_cost[go] += step[:, size:]
            grow_cost[go, i] = torch.inf
            cut_cost[go, j] = torch.inf
        return taken

    def swap_in_groups_(self, most: Tensor, span: int) -> Tensor:
        """The same for pairs inside groups of ``span`` inputs, one of each group at a time."""
        change, grown, cut = self._best_in_groups(span)
        size = min(SHORTLIST, change.shape[1])
        costs, groups = change.topk(size, 1, largest=False)
        grown, cut = grown.gather(1, groups), cut.gather(1, groups)
        both = self._together(torch.cat([grown, cut], 1)).view(-1, 2, size, 2, size)
        beside = both[:, 0, :, 0] - both[:, 0, :, 1] - both[:, 1, :, 0] + both[:, 1, :, 1]
        taken = torch.zeros_like(most)
        for _ in range(SWAPS):
            change, i = costs.min(1)
            go = self._accept_(change, taken, most, grown[self.all, i], cut[self.all, i])
            if not len(go):
                break
            costs[go] += beside[go, i[go]]
            costs[go, i[go]] = torch.inf
        return taken

    def _best_in_groups(self, span: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all pairs in each group the best: change, column grown, column cut."""
        rows, columns = self.weight.shape
        column = torch.arange(columns, device=self.cost.device)
        best = torch.full_like(self.cost, torch.inf)
        other = torch.zeros_like(self.mask, dtype=torch.long)
        for shift in range(1, span):
            partner = column - column % span + (column + shift) % span
            together = 2 * self.weight * self.weight[:, partner] * self.gram[column, partner]
            change = self.cost + self.cost[:, partner] - together
            change.masked_fill_(self.mask | ~self.mask[:, partner], torch.inf)
            lower = change < best
            best = torch.where(lower, change, best)
            other = torch.where(lower, partner, other)
        change, at = best.reshape(rows, -1, span).min(2)
        grown = at + torch.arange(0, columns, span, device=at.device)
        return change, grown, other.gather(1, grown)

    def _together(self, columns: Tensor) -> Tensor:
        """``2 W_i W_j G_ij`` for some columns of each row, ``(rows, columns, columns)``."""
        weight = self.weight.gather(1, columns)
        gram = self.gram[columns[:, :, None], columns[:, None, :]]
        return gram.mul_(2 * weight[:, :, None]).mul_(weight[:, None, :])

    def _accept_(
        self, change: Tensor, taken: Tensor, most: Tensor, grown: Tensor, cut: Tensor
    ) -> Tensor:
        """Take one swap in each row that it makes better; says in which rows."""
        # the threshold is above what rounding could feign
        go = ((change < -1e-6 * self.error) & (taken < most)).nonzero().flatten()
        self.mask[go, grown[go]] = True
        self.mask[go, cut[go]] = False
        self.error[go] += change[go]
        taken[go] += 1
        return go
