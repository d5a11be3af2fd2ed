"""Swaps that lower the exact calibrated error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.statistics import Need, Statistics

CHUNK = 2**20
"""Number of weights that are refined together; bounds the memory for layers with many rows."""

SHORTLIST = 16
"""Number of weights to grow, and to prune, of which all pairs are examined (N:M: of groups)."""

PARTS = 8
"""Number of columns in each of the groups from which a shortlist is selected."""

SWAPS = 8
"""Maximum number of swaps per output row before its shortlist is rebuilt."""


@dataclass(frozen=True)
class ExactSwap(MaskRefiner):
    """Swaps that lower the exact calibrated error: SparseSwaps, arXiv 2512.10922.

    The error of row q is ``E_q = r G rᵀ`` with ``r = W_q`` where pruned and 0 elsewhere. Only swaps
    that lower ``E_q`` are applied, so the error never increases, and a row is finished when no swap
    on its shortlist lowers it.

    Unlike the paper, which examines all pairs before every swap, this implementation uses a
    shortlist: the 16 weights that cost least to grow alone and the 16 that cost least to prune
    alone. The best of the 256 pairs is swapped up to 8 times, with exact costs, before the
    shortlist is rebuilt. For N:M, the shortlist has the best pair of each of the 16 best groups.

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
            if window is None:
                swaps = state.swap_in_rows_(budget_left)
            else:
                swaps = state.swap_in_groups_(budget_left, window)
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
        # arithmetic with 0 and 1 instead of torch.where, which is several times slower on a CPU
        removed = torch.addcmul(weight, weight, mask.to(weight.dtype), value=-1)
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

    def swap_in_rows_(self, max_swaps: Tensor) -> Tensor:
        """Swap pairs from the shortlists.

        Args:
            max_swaps: Maximum number of swaps in each row, ``(rows,)``.

        Returns:
            Number of swaps in each row, ``(rows,)``.
        """
        size = min(SHORTLIST, self.weight.shape[1])
        cost, kept = self._costs()
        # A large cost excludes weights on the wrong side of the mask: finite, since 0 · inf is NaN,
        # and a quarter of the maximum, so that the sum of two does not overflow.
        excluded = torch.finfo(cost.dtype).max / 4
        grow_cost, to_grow = lowest(torch.add(cost, kept, alpha=excluded), size)
        prune_cost, to_prune = lowest(torch.add(cost, 1 - kept, alpha=excluded), size)
        # All pairs among the 2·size columns, since each swap changes the costs of the others.
        shortlist = _Shortlist(torch.cat([to_grow, to_prune], 1), max_swaps, cost.dtype)
        interaction = self._interaction(shortlist.columns)
        live = torch.arange(len(cost), device=cost.device)
        for _ in range(SWAPS):
            pairs = grow_cost[:, :, None] + prune_cost[:, None, :] - interaction[:, :size, size:]
            change, best = pairs.flatten(1).min(1)
            i, j = best // size, best % size
            swapped = self._swap_if_better_(shortlist, live, change, i, size + j)
            if not len(swapped):
                break
            if 2 * len(swapped) < len(live):
                # rows that do not swap now never do with this shortlist: drop them
                live, interaction = live[swapped], interaction[swapped]
                grow_cost, prune_cost = grow_cost[swapped], prune_cost[swapped]
                i, j = i[swapped], j[swapped]
                swapped = torch.arange(len(live), device=live.device)
            else:
                i, j = i[swapped], j[swapped]
            # The swap has changed ``r`` by W_p at p and by −W_g at g, and so the linear term of
            # every other cost: − for weights to grow and + for weights to prune.
            step = interaction[swapped, size + j] - interaction[swapped, i]
            grow_cost[swapped] -= step[:, :size]
            prune_cost[swapped] += step[:, size:]
            # Both weights have changed sides, for which this shortlist has no costs.
            grow_cost[swapped, i] = torch.inf
            prune_cost[swapped, j] = torch.inf
        self._update_product_(shortlist)
        return shortlist.swaps

    def swap_in_groups_(self, max_swaps: Tensor, window: int) -> Tensor:
        """Swap pairs within groups of ``window`` inputs, one pair per group and shortlist.

        Args:
            max_swaps: Maximum number of swaps in each row, ``(rows,)``.
            window: Number of inputs in a group.

        Returns:
            Number of swaps in each row, ``(rows,)``.
        """
        change, grown, pruned = self._best_in_groups(window)
        size = min(SHORTLIST, change.shape[1])
        costs, groups = change.topk(size, 1, largest=False)
        columns = torch.cat([grown.gather(1, groups), pruned.gather(1, groups)], 1)
        shortlist = _Shortlist(columns, max_swaps, costs.dtype)
        single = self._interaction(columns).view(-1, 2, size, 2, size)
        # Interaction of two swaps: of equal sign between two grown or two pruned weights, of
        # opposite sign between a grown and a pruned one.
        interaction = (
            single[:, 0, :, 0] - single[:, 0, :, 1] - single[:, 1, :, 0] + single[:, 1, :, 1]
        )
        live = torch.arange(len(costs), device=costs.device)
        for _ in range(SWAPS):
            change, i = costs.min(1)
            swapped = self._swap_if_better_(shortlist, live, change, i, size + i)
            if not len(swapped):
                break
            costs[swapped] += interaction[swapped, i[swapped]]
            costs[swapped, i[swapped]] = torch.inf
        self._update_product_(shortlist)
        return shortlist.swaps

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
        kept = self.mask.to(self.weight.dtype)
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

    def _swap_if_better_(
        self, shortlist: _Shortlist, live: Tensor, change: Tensor, i: Tensor, j: Tensor
    ) -> Tensor:
        """Swap one pair in each live row whose error it lowers.

        Args:
            shortlist: The shortlists.
            live: Rows that may swap, ``(n,)``.
            change: Change of the error of each live row, ``(n,)``.
            i: Position of the weight to grow in the shortlist of each live row, ``(n,)``.
            j: Position of the weight to prune, ``(n,)``.

        Returns:
            Which of the live rows have swapped, as indices into ``live``.
        """
        may_swap = shortlist.swaps[live] < shortlist.max_swaps[live]
        # the threshold exceeds possible rounding error, so that swaps cannot go back and forth
        swapped = ((change < -1e-6 * self.error[live]) & may_swap).nonzero().flatten()
        rows, i, j = live[swapped], i[swapped], j[swapped]
        grown, pruned = shortlist.columns[rows, i], shortlist.columns[rows, j]
        self.mask[rows, grown] = True
        self.mask[rows, pruned] = False
        shortlist.removed[rows, i] = -self.weight[rows, grown]
        shortlist.removed[rows, j] = self.weight[rows, pruned]
        self.error[rows] += change[swapped]
        shortlist.swaps[rows] += 1
        return swapped

    def _update_product_(self, shortlist: _Shortlist) -> None:
        """Add what the swaps of a shortlist have changed in ``r`` to ``r G``."""
        # a sum of few rows of G for each row of weights, in place of a matrix product
        self.product += F.embedding_bag(
            shortlist.columns, self.gram, per_sample_weights=shortlist.removed, mode="sum"
        )


def lowest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the lowest values of each row in ascending order, and their columns.

    Args:
        x: Shape ``(rows, columns)``.
        count: Number of values, at most ``columns``.

    Examples:
        >>> values, columns = lowest(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        >>> values.tolist(), columns.tolist()
        ([[1.0, 2.0]], [[1, 2]])
    """
    rows, columns = x.shape
    groups = columns // PARTS
    if columns % PARTS or groups < 2 * count:
        values, indices = x.topk(count, 1, largest=False)
        return values, indices
    # The lowest `count` values are in the `count` groups with the lowest minimum. Selecting these
    # groups first halves the time of topk, which most of the refinement is spent in.
    parts = x.view(rows, PARTS, groups)  # a group is every `groups`-th column
    group = parts.amin(1).topk(count, 1, largest=False, sorted=False).indices
    candidates = parts.gather(2, group[:, None].expand(-1, PARTS, -1)).flatten(1)
    values, position = candidates.topk(count, 1, largest=False)
    return values, position // count * groups + group.gather(1, position % count)


class _Shortlist:
    """Columns of which pairs are swapped, and the swaps so far.

    Args:
        columns: Columns of each row, ``(rows, n)``: those of weights to grow, then to prune.
        max_swaps: Maximum number of swaps in each row, ``(rows,)``.
        dtype: Data type of the weights.
    """

    def __init__(self, columns: Tensor, max_swaps: Tensor, dtype: torch.dtype) -> None:
        self.columns, self.max_swaps = columns, max_swaps
        self.swaps = torch.zeros_like(max_swaps)
        self.removed = torch.zeros(columns.shape, dtype=dtype, device=columns.device)
        """Change of ``r`` at each column."""
