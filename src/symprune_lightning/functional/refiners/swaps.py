"""The swap loop shared by DSnoT and R²-DSnoT, the exact error of swaps, and partial selection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from symprune_lightning.functional.tensors import as_number

CYCLES_BETWEEN_CHECKS = 8
"""Cycles between two tests whether any row is active."""


@dataclass(frozen=True)
class Pairs:
    """Candidate swaps of each row, best first, in two lists.

    List 0 reduces a positive mean error: it grows a weight with ``C > 0`` and prunes one with
    ``C < 0``. List 1 reduces a negative one, with the signs reversed. Every weight is in at most
    one pair, so a swap never invalidates another pair.

    Attributes:
        grown: Column of the weight to grow, ``(rows, 2, candidates)``.
        pruned: Column of the weight to prune, same shape.
        count: Number of valid candidates, ``(rows, 2)``; entries after them are arbitrary.
    """

    grown: Tensor
    pruned: Tensor
    count: Tensor


def candidate_pairs(
    grow_key: Tensor,
    prune_key: Tensor,
    mask: Tensor,
    contribution: Tensor,
    limit: int,
    window: int | None,
) -> Pairs:
    """Combine the weights to grow with the weights to prune.

    Args:
        grow_key: ``(rows, columns)``; the weight with the largest key is grown first.
        prune_key: Same shape; the weight with the smallest key is pruned first.
        mask: Same shape, bool, True = kept.
        contribution: ``C = W·mean``, same shape.
        limit: Maximum number of pairs in each of the two lists.
        window: Pairs stay within groups of this number of inputs; ``None`` for the whole row.
    """
    if window is None:
        return _row_pairs(grow_key, prune_key, mask, contribution, limit)
    return _group_pairs(grow_key, prune_key, mask, contribution, limit, window)


def _row_pairs(
    grow_key: Tensor, prune_key: Tensor, mask: Tensor, contribution: Tensor, limit: int
) -> Pairs:
    """Pair the i-th best weight to grow with the i-th best weight to prune."""
    positive, negative = contribution > 0, contribution < 0
    limit = min(limit, mask.shape[1])
    lists = []
    for grows, prunes in ((positive, negative), (negative, positive)):
        grown, grown_count = _first(grow_key.neg(), ~mask & grows, limit)
        pruned, pruned_count = _first(prune_key, mask & prunes, limit)
        lists.append((grown, pruned, torch.minimum(grown_count, pruned_count)))
    return Pairs(*(torch.stack(x, 1) for x in zip(*lists, strict=True)))


def _group_pairs(
    grow_key: Tensor, prune_key: Tensor, mask: Tensor, contribution: Tensor, limit: int, window: int
) -> Pairs:
    """Pair the best weight to grow with the best weight to prune in each group of inputs.

    Groups are ordered by the key of their weight to grow. A group may have a pair in both lists.
    """
    rows, columns = mask.shape

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(-1, window)

    start = torch.arange(0, columns, window, device=mask.device)
    positive, negative = contribution > 0, contribution < 0
    limit = min(limit, len(start))
    lists = []
    for grows, prunes in ((positive, negative), (negative, positive)):
        grown, grown_count = _first(grouped(grow_key.neg()), grouped(~mask & grows), 1)
        pruned, pruned_count = _first(grouped(prune_key), grouped(mask & prunes), 1)
        both = ((grown_count > 0) & (pruned_count > 0)).reshape(rows, -1)
        best = grouped(grow_key).gather(1, grown).reshape(rows, -1)
        order, count = _first(best.neg(), both, limit)
        columns_of = (start + x.reshape(rows, -1) for x in (grown, pruned))
        lists.append((*(x.gather(1, order) for x in columns_of), count))
    return Pairs(*(torch.stack(x, 1) for x in zip(*lists, strict=True)))


class ExactError:
    """Change of the exact error ``E_q = r G rᵀ`` by swaps, with ``r = W_q`` where pruned.

    SparseSwaps, arXiv 2512.10922. Growing g changes the error by ``−2W_g(rG)_g + W_g²G_gg``,
    pruning p by ``+2W_p(rG)_p + W_p²G_pp``, and both together by the further ``−2W_gW_pG_gp``.

    Args:
        weight: Dense ``W``, ``(rows, columns)``.
        mask: Bool, same shape, True = kept.
        gram: ``G``, ``(columns, columns)``.
    """

    def __init__(self, weight: Tensor, mask: Tensor, gram: Tensor) -> None:
        self.weight = weight
        self.gram = gram.to(weight.dtype)
        removed = weight * as_number(~mask, weight.dtype)
        self.product = removed @ self.gram  # r G, updated by every swap
        self._rows = torch.arange(len(weight), device=weight.device)

    def change(self, grown: Tensor, pruned: Tensor) -> Tensor:
        """Return the change of each row's error by growing and pruning one column each.

        Args:
            grown: Column to grow in each row, ``(rows,)``.
            pruned: Column to prune in each row, ``(rows,)``.

        Returns:
            Shape ``(rows,)``.
        """
        rows, gram = self._rows, self.gram
        w_grown, w_pruned = self.weight[rows, grown], self.weight[rows, pruned]
        separate = w_grown.square() * gram[grown, grown] + w_pruned.square() * gram[pruned, pruned]
        linear = w_pruned * self.product[rows, pruned] - w_grown * self.product[rows, grown]
        return separate + 2 * linear - 2 * w_grown * w_pruned * gram[grown, pruned]

    def swap_(self, rows: Tensor, grown: Tensor, pruned: Tensor) -> None:
        """Apply one swap in each of the given rows; all arguments have shape ``(n,)``."""
        w_grown, w_pruned = self.weight[rows, grown], self.weight[rows, pruned]
        self.product[rows] += (
            w_pruned[:, None] * self.gram[pruned] - w_grown[:, None] * self.gram[grown]
        )


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
    """Apply swaps in the order of the pairs until each row's mean error is below the threshold.

    All rows are processed at once. A row is finished when its error is small enough, when it has no
    pairs left, or at the first swap that `same_sign` or `lower_mean` forbids. Pairs that would not
    lower the exact error are skipped.

    Args:
        mask: Bool, ``(rows, columns)``, True = kept. Not modified.
        pairs: Candidate swaps.
        contribution: ``C = W·mean``, ``(rows, columns)``.
        cycles: Maximum number of pairs examined per row.
        threshold: A row with ``|e_q|`` at most this is finished; tested before a swap.
        same_sign: Forbid swaps after which ``e_q`` does not have its initial sign.
        lower_mean: Forbid swaps that do not lower ``|e_q|``.
        exact: Skip swaps that do not lower this exact error.

    Returns:
        The new mask.
    """
    table = _PairTable(pairs, contribution)
    error = (contribution * as_number(~mask, contribution.dtype)).sum(1, keepdim=True)
    sign = error.sign()
    active = torch.ones_like(error, dtype=torch.bool)
    for cycle in range(cycles):
        # The list follows the current sign: after a swap that overshoots, a row continues with the
        # next pair of the other list.
        side = (error < 0).long()
        turn, is_pair = table.next(side)
        after = error + table.pruned_by(turn) - table.grown_by(turn)
        active &= (error.abs() > threshold) & is_pair
        if same_sign:
            active &= after.sign() == sign
        if lower_mean:
            active &= after.abs() < error.abs()
        # not in every cycle: a GPU waits for each copy to the host
        if cycle % CYCLES_BETWEEN_CHECKS == 0 and not active.any():
            break
        swapped = active if exact is None else active & table.lowers(exact, turn)
        if exact is not None:
            table.swap_(exact, turn, swapped)
        error = torch.where(swapped, after, error)
        table.advance_(side, turn, active, swapped)
    return table.applied_to(mask)


class _PairTable:
    """Candidate pairs side by side, how many of them each row has examined, and which it swapped.

    Tensors of one value per row have shape ``(rows, 1)``. Everything in the loop over cycles is a
    gather from a narrow table: indexing the whole matrix by row and column takes ten times as long.

    Args:
        pairs: The pairs.
        contribution: ``C = W·mean``, ``(rows, columns)``.
    """

    def __init__(self, pairs: Pairs, contribution: Tensor) -> None:
        self._count = pairs.count
        # one pair more in each list, never swapped: what rows without pairs are pointed to
        self._width = pairs.grown.shape[2] + 1
        self._grown, self._pruned = (
            F.pad(columns, (0, 1)).flatten(1) for columns in (pairs.grown, pairs.pruned)
        )
        self._grown_by = contribution.gather(1, self._grown)
        self._pruned_by = contribution.gather(1, self._pruned)
        self._examined = torch.zeros_like(pairs.count)
        self._swapped = torch.zeros_like(self._grown, dtype=torch.bool)

    def next(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position of the next pair of a list, and whether there is one."""
        examined = self._examined.gather(1, side)
        return side * self._width + examined, examined < self._count.gather(1, side)

    def grown_by(self, turn: Tensor) -> Tensor:
        """Return the contribution of the weight that a pair grows."""
        return self._grown_by.gather(1, turn)

    def pruned_by(self, turn: Tensor) -> Tensor:
        """Return the contribution of the weight that a pair prunes."""
        return self._pruned_by.gather(1, turn)

    def lowers(self, exact: ExactError, turn: Tensor) -> Tensor:
        """Return whether a pair lowers the exact error."""
        return exact.change(*self._columns(turn))[:, None] < 0

    def swap_(self, exact: ExactError, turn: Tensor, swapped: Tensor) -> None:
        """Update the exact error of the rows that swap a pair."""
        grown, pruned = self._columns(turn)
        rows = swapped.nonzero()[:, 0]
        exact.swap_(rows, grown[rows], pruned[rows])

    def advance_(self, side: Tensor, turn: Tensor, examined: Tensor, swapped: Tensor) -> None:
        """Mark a pair as examined, whether or not it was swapped: none is examined twice."""
        self._examined.scatter_add_(1, side, examined.long())
        self._swapped.scatter_(1, turn, swapped)  # a row that is finished points to a later pair

    def applied_to(self, mask: Tensor) -> Tensor:
        """Return a mask after all swaps."""
        mask = mask.clone()
        rows, turn = self._swapped.nonzero(as_tuple=True)
        mask[rows, self._grown[rows, turn]] = True
        mask[rows, self._pruned[rows, turn]] = False
        return mask

    def _columns(self, turn: Tensor) -> tuple[Tensor, Tensor]:
        return self._grown.gather(1, turn)[:, 0], self._pruned.gather(1, turn)[:, 0]


def _first(key: Tensor, eligible: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the smallest eligible keys of each row in order, and their number."""
    # An eligible key may be infinite (a constant channel) and must precede the ineligible ones.
    # A sum, since torch.where takes several times as long on a CPU.
    largest = torch.finfo(key.dtype).max / 4
    key = key.clamp(-largest, largest).add_(as_number(~eligible, key.dtype), alpha=3 * largest)
    return lowest(key, limit)[1], eligible.sum(1).clamp_max(limit)


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
    # the number of values among which one is selected is lowest for sqrt(columns / count)
    size = 2 ** round(math.log2(columns / max(count, 1)) / 2)
    groups = columns // size
    if columns % size or groups < 2 * count:
        values, indices = x.topk(count, 1, largest=False)
        return values, indices
    # The lowest `count` values are in the `count` groups with the lowest minimum. Selecting these
    # groups first halves the time of topk, which most of the refinement is spent in.
    parts = x.view(rows, size, groups)  # a group is every `groups`-th column
    group = parts.amin(1).topk(count, 1, largest=False, sorted=False).indices
    candidates = parts.gather(2, group[:, None].expand(-1, size, -1)).flatten(1)
    values, position = candidates.topk(count, 1, largest=False)
    return values, position // count * groups + group.gather(1, position % count)
