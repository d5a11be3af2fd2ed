"""Swaps that lower the exact calibrated error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.refiners.shortlist import (
    GroupShortlist,
    PairShortlist,
    Shortlist,
    lowest_of_groups,
)
from symprune_lightning.functional.registry import check_at_least
from symprune_lightning.functional.statistics import Need, Statistics
from symprune_lightning.functional.tensors import as_number

CHUNK = 2**20
"""Number of weights that are refined together; bounds the memory for layers with many rows."""

SHORTLIST = 16
"""Number of weights to grow, and to prune, of which all pairs are examined (N:M: of groups)."""


@dataclass(frozen=True)
class ExactSwap(MaskRefiner):
    """Swaps that lower the exact calibrated error: SparseSwaps, arXiv 2512.10922.

    The error of row q is ``E_q = r G rᵀ`` with ``r = W_q`` where pruned and 0 elsewhere. Only swaps
    that lower ``E_q`` are applied, so the error never increases, and a row is finished when no swap
    on its shortlist lowers it.

    Unlike the paper, which examines all pairs before every swap, this implementation uses a
    shortlist: 16 weights that cost little to grow alone and 16 that cost little to prune alone,
    each the best of a group of up to 8 columns. The best of the 256 pairs is swapped up to 6 times,
    with exact costs, before the shortlist is rebuilt. For N:M, the shortlist has the best pair of
    each of the 16 best groups.

    Attributes:
        cycles: ``T``, maximum number of swaps per output row. As in DSnoT, 50 by
            default.

    Examples:
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
        >>> statistics = Statistics(gram=(x.T @ x / 2).double())
        >>> mask = torch.tensor([[True, False, False]])
        >>> ExactSwap()(torch.tensor([[1.0, 1.5, 1.0]]), mask, statistics).tolist()
        [[False, True, False]]
    """

    cycles: int = 50
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2512.10922"

    def __post_init__(self) -> None:
        check_at_least(0, cycles=self.cycles)

    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, window: int | None = None
    ) -> Tensor:
        """See `MaskRefiner`."""
        gram = statistics.gram_matrix.to(weight.dtype)
        size = max(1, CHUNK // weight.shape[1])
        refined = mask.clone()
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            self._refine_(refined[rows], weight[rows], gram, window)
        return refined

    def _refine_(self, mask: Tensor, weight: Tensor, gram: Tensor, window: int | None) -> None:
        """Refine the mask of some rows in place."""
        rows = torch.arange(len(mask), device=mask.device)
        budget_left = torch.full_like(rows, self.cycles)
        state = _Rows(weight, mask.clone(), gram)
        while len(rows):
            swaps = state.swap_(budget_left, window)
            mask[rows] = state.mask
            # Rows need different numbers of rounds; finished ones are dropped.
            budget_left = budget_left - swaps
            active = ((swaps > 0) & (budget_left > 0)).nonzero().flatten()
            rows, budget_left = rows[active], budget_left[active]
            state.select_(active)


class _Rows:
    """Masks of some rows and the cost of swaps in them.

    ``cost`` is the change of ``E_q`` if one weight alone changes from kept to pruned or back,
    ``W_r² G_rr ± 2 W_r (rG)_r``: + where kept and − where pruned. Growing g and pruning p together
    costs ``cost_g + cost_p − 2 W_g W_p G_gp``; the last term is the pair's *interaction*.
    """

    def __init__(self, weight: Tensor, mask: Tensor, gram: Tensor) -> None:
        removed = weight * as_number(~mask, weight.dtype)
        self.product = removed @ gram  # r G; swaps update it
        self.own = weight.square() * gram.diagonal()
        self.own.masked_fill_(weight == 0, torch.inf)  # weights that are zero stay pruned
        self.error = (self.product * removed).sum(1)
        self.weight, self.mask, self.gram = weight, mask, gram

    def select_(self, rows: Tensor) -> None:
        """Drop all rows but the given ones, ``(rows,)``."""
        if len(rows) < len(self.weight):
            for name in ("weight", "mask", "product", "own", "error"):
                setattr(self, name, getattr(self, name)[rows])

    def swap_(self, max_swaps: Tensor, window: int | None) -> Tensor:
        """Swap pairs from new shortlists.

        Args:
            max_swaps: Maximum number of swaps in each row, ``(rows,)``.
            window: Number of inputs in a group within which to swap, one pair per group and
                shortlist; ``None`` to swap in the whole row.

        Returns:
            Number of swaps in each row, ``(rows,)``.
        """
        shortlist = self._row_shortlist() if window is None else self._group_shortlist(window)
        swapped, self.error = shortlist.swap(self.error, max_swaps)
        size = swapped.shape[1] // 2
        change = torch.cat([swapped[:, :size], -swapped[:, size:]], 1)  # of the mask
        self.mask.view(torch.int8).scatter_add_(1, shortlist.columns, change.to(torch.int8))
        # a sum of few rows of G for each row of weights, in place of a matrix product
        removed = -change * self.weight.gather(1, shortlist.columns)
        self.product += F.embedding_bag(
            shortlist.columns, self.gram, per_sample_weights=removed, mode="sum"
        )
        return swapped[:, :size].sum(1).long()

    def _row_shortlist(self) -> Shortlist:
        """Return the weights that cost least to grow, and to prune, each alone."""
        size = min(SHORTLIST, self.weight.shape[1])
        cost, kept = self._costs()
        # A large cost excludes weights on the wrong side of the mask: finite, since 0 · inf is NaN,
        # and a quarter of the maximum, so that the sum of two does not overflow.
        excluded = torch.finfo(cost.dtype).max / 4
        grow_cost, to_grow = lowest_of_groups(torch.add(cost, kept, alpha=excluded), size)
        prune_cost, to_prune = lowest_of_groups(torch.add(cost, 1 - kept, alpha=excluded), size)
        columns = torch.cat([to_grow, to_prune], 1)
        # of all pairs among the 2·size columns, since each swap changes the costs of the others
        return PairShortlist(columns, grow_cost, prune_cost, self._interaction(columns))

    def _group_shortlist(self, window: int) -> Shortlist:
        """Return the best pair of each of the best groups."""
        change, grown, pruned = self._best_in_groups(window)
        size = min(SHORTLIST, change.shape[1])
        costs, groups = change.topk(size, 1, largest=False)
        columns = torch.cat([grown.gather(1, groups), pruned.gather(1, groups)], 1)
        single = self._interaction(columns).view(-1, 2, size, 2, size)
        # Interaction of two swaps: of equal sign between two grown or two pruned weights, of
        # opposite sign between a grown and a pruned one.
        interaction = (
            single[:, 0, :, 0] - single[:, 0, :, 1] - single[:, 1, :, 0] + single[:, 1, :, 1]
        )
        return GroupShortlist(columns, costs, interaction)

    def _best_in_groups(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best pair of each group: change, column to grow, column to prune."""
        rows, columns = self.weight.shape
        cost, _ = self._costs()
        column = torch.arange(columns, device=cost.device)
        lowest = torch.full_like(cost, torch.inf)
        best_partner = torch.zeros_like(self.mask, dtype=torch.long)
        # Shifting each group cyclically pairs every weight with each other one of its group, in
        # ``window − 1`` steps without a (rows, groups, window, window) tensor.
        for shift in range(1, window):
            partner = column - column % window + (column + shift) % window
            interaction = 2 * self.weight * self.weight[:, partner] * self.gram[column, partner]
            change = cost + cost[:, partner] - interaction
            change.masked_fill_(self.mask | ~self.mask[:, partner], torch.inf)
            lower = change < lowest
            lowest = torch.where(lower, change, lowest)
            best_partner = torch.where(lower, partner, best_partner)
        change, position = lowest.reshape(rows, -1, window).min(2)
        grown = position + torch.arange(0, columns, window, device=position.device)
        return change, grown, best_partner.gather(1, grown)

    def _costs(self) -> tuple[Tensor, Tensor]:
        """Return the cost of each weight, and 1 where it is kept and 0 elsewhere."""
        kept = as_number(self.mask, self.weight.dtype)
        return torch.addcmul(self.own, self.weight * self.product, kept * 2 - 1, value=2), kept

    def _interaction(self, columns: Tensor) -> Tensor:
        """Return ``2 W_i W_j G_ij`` for ``columns`` (rows, n) as ``(rows, n, n)``."""
        weight = self.weight.gather(1, columns)
        size = len(self.gram)
        # one index into the flat matrix, of 32 bits if that suffices, is several times faster
        short = columns.int() if size * size < 2**31 else columns
        index = (short[:, :, None] * size + short[:, None, :]).flatten()
        gram = self.gram.flatten().index_select(0, index).view(*columns.shape, -1)
        return gram.mul_(2 * weight[:, :, None]).mul_(weight[:, None, :])
