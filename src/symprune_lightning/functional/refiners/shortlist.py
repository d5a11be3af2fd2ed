"""Shortlists of the weights, or pairs of weights, that ExactSwap may swap."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from symprune_lightning.functional.tensors import as_number

SWAPS = 6
"""Maximum number of swaps per output row before its shortlist is rebuilt."""


class Shortlist(ABC):
    """Columns of which pairs are swapped, with the costs of rows that may still swap.

    Args:
        columns: Columns of each row, ``(rows, 2·size)``: those of weights to grow, then to prune.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    @abstractmethod
    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best swap of each row.

        Returns:
            The change of the row's error, and the positions in ``columns`` of the weight to grow
            and of the weight to prune, each ``(rows, 1)``.
        """

    @abstractmethod
    def update_(self, grown: Tensor, pruned: Tensor) -> None:
        """Change the costs of what is left by a swap, and exclude its two weights."""

    @abstractmethod
    def select_(self, rows: Tensor) -> None:
        """Drop the costs of all rows but the given ones."""

    def swap(self, error: Tensor, max_swaps: Tensor) -> tuple[Tensor, Tensor]:
        """Swap the best pair of each row, up to 6 times.

        Args:
            error: ``E_q`` of each row, ``(rows,)``.
            max_swaps: Maximum number of swaps in each row, ``(rows,)``.

        Returns:
            1 where a column was swapped and 0 elsewhere, ``(rows, 2·size)``, and the new errors.
        """
        live = torch.arange(len(error), device=error.device)
        swapped = torch.zeros(self.columns.shape, dtype=error.dtype, device=error.device)
        all_errors, all_swapped = error, swapped.clone()
        error, left = error[:, None].clone(), max_swaps[:, None].clone()
        is_live = torch.ones_like(left, dtype=torch.bool)
        for _ in range(SWAPS):
            change, grown, pruned = self.best()
            # The threshold exceeds possible rounding error, so that swaps cannot go back and forth.
            # A row that does not swap now never does with this shortlist.
            is_live &= (change < -1e-6 * error) & (left > 0)
            number = as_number(is_live, error.dtype)
            swapped.scatter_add_(1, grown, number).scatter_add_(1, pruned, number)
            error += torch.where(is_live, change, 0)
            left -= is_live.long()
            self.update_(grown, pruned)
            rows = is_live[:, 0].nonzero()[:, 0]
            if 2 * len(rows) > len(is_live):
                continue
            all_swapped[live], all_errors[live] = swapped, error[:, 0]
            if not len(rows):
                break
            self.select_(rows)
            live, swapped, error, left, is_live = (
                x[rows] for x in (live, swapped, error, left, is_live)
            )
        else:
            all_swapped[live], all_errors[live] = swapped, error[:, 0]
        return all_swapped, all_errors


class PairShortlist(Shortlist):
    """Weights of which all pairs may be swapped.

    Args:
        columns: Those of weights to grow, then to prune, ``(rows, 2·size)``.
        grow_cost: Cost of growing each alone, ``(rows, size)``.
        prune_cost: Cost of pruning each alone, ``(rows, size)``.
        interaction: ``(rows, 2·size, 2·size)``.
    """

    def __init__(
        self, columns: Tensor, grow_cost: Tensor, prune_cost: Tensor, interaction: Tensor
    ) -> None:
        super().__init__(columns)
        self.grow_cost, self.prune_cost, self.interaction = grow_cost, prune_cost, interaction

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Shortlist`."""
        size = self.grow_cost.shape[1]
        pairs = self.grow_cost[:, :, None] + self.prune_cost[:, None, :]
        pairs -= self.interaction[:, :size, size:]
        change, best = pairs.flatten(1).min(1, keepdim=True)
        return change, best // size, size + best % size

    def update_(self, grown: Tensor, pruned: Tensor) -> None:
        """See `Shortlist`."""
        size = self.grow_cost.shape[1]
        # The swap has changed ``r`` by W_p at p and by −W_g at g, and so the linear term of every
        # other cost: − for weights to grow and + for weights to prune.
        step = _rows_of(self.interaction, pruned) - _rows_of(self.interaction, grown)
        self.grow_cost -= step[:, :size]
        self.prune_cost += step[:, size:]
        # both weights have changed sides, for which this shortlist has no costs
        self.grow_cost.scatter_(1, grown, torch.inf)
        self.prune_cost.scatter_(1, pruned - size, torch.inf)

    def select_(self, rows: Tensor) -> None:
        """See `Shortlist`."""
        self.grow_cost, self.prune_cost = self.grow_cost[rows], self.prune_cost[rows]
        self.interaction = self.interaction[rows]


class GroupShortlist(Shortlist):
    """Pairs in different groups, each of which may be swapped once.

    Args:
        columns: Those to grow, then those to prune, ``(rows, 2·size)``.
        costs: Cost of swapping each pair, ``(rows, size)``.
        interaction: Of the pairs, ``(rows, size, size)``.
    """

    def __init__(self, columns: Tensor, costs: Tensor, interaction: Tensor) -> None:
        super().__init__(columns)
        self.costs, self.interaction = costs, interaction

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Shortlist`."""
        change, best = self.costs.min(1, keepdim=True)
        return change, best, self.costs.shape[1] + best

    def update_(self, grown: Tensor, pruned: Tensor) -> None:
        """See `Shortlist`."""
        self.costs += _rows_of(self.interaction, grown)
        self.costs.scatter_(1, grown, torch.inf)

    def select_(self, rows: Tensor) -> None:
        """See `Shortlist`."""
        self.costs, self.interaction = self.costs[rows], self.interaction[rows]


def lowest_of_groups(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return low values of each row and their columns: the lowest minima of groups of columns.

    The lowest value is among them. Others of the lowest values are not if their group has a lower
    one; a shortlist gets these when it is rebuilt. Takes half of the time of the lowest values.

    Args:
        x: Shape ``(rows, columns)``.
        count: Number of values, at most ``columns``.

    Examples:
        >>> values, columns = lowest_of_groups(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 2)
        >>> values.tolist(), columns.tolist()
        ([[1.0, 2.0]], [[1, 2]])
    """
    rows, columns = x.shape
    size = next((n for n in (8, 4, 2) if columns % n == 0 and columns // n >= 2 * count), 1)
    groups = columns // size
    parts = x.view(rows, size, groups)  # a group is every `groups`-th column
    values, group = parts.amin(1).topk(count, 1, largest=False)
    part = parts.gather(2, group[:, None].expand(-1, size, -1)).min(1).indices
    return values, part * groups + group


def _rows_of(matrices: Tensor, position: Tensor) -> Tensor:
    """Return row ``position`` (n, 1) of each of ``matrices`` (n, size, size) as ``(n, size)``."""
    count, size = len(matrices), matrices.shape[1]
    first = torch.arange(0, count * size, size, device=position.device)
    return matrices.flatten(0, 1).index_select(0, first + position[:, 0])
