"""The swap loop shared by DSnoT and R²-DSnoT, and the exact error of swaps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        self.product = weight.masked_fill(mask, 0) @ self.gram  # r G, updated by every swap
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
    mask = mask.clone()
    rows = torch.arange(len(mask), device=mask.device)
    error = contribution.masked_fill(mask, 0).sum(1)
    sign = error.sign()
    examined = torch.zeros_like(pairs.count)  # in each list
    active = torch.ones_like(error, dtype=torch.bool)
    last = pairs.grown.shape[2] - 1
    for _ in range(cycles):
        # The list follows the current sign: after a swap that overshoots, a row continues with the
        # next pair of the other list.
        side = (error < 0).long()
        turn = examined[rows, side]
        index = (rows, side, turn.clamp_max(last))  # finished rows read any valid pair
        grown, pruned = pairs.grown[index], pairs.pruned[index]
        after = error + contribution[rows, pruned] - contribution[rows, grown]
        active &= (error.abs() > threshold) & (turn < pairs.count[rows, side])
        if same_sign:
            active &= after.sign() == sign
        if lower_mean:
            active &= after.abs() < error.abs()
        if not active.any():
            break
        swapped = active if exact is None else active & (exact.change(grown, pruned) < 0)
        mask[rows[swapped], grown[swapped]] = True
        mask[rows[swapped], pruned[swapped]] = False
        if exact is not None:
            exact.swap_(rows[swapped], grown[swapped], pruned[swapped])
        error = torch.where(swapped, after, error)
        # Pointers advance whether or not the pair was swapped, so that a skipped pair is not
        # examined again.
        examined[rows, side] += 1
    return mask


def _first(key: Tensor, eligible: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the smallest eligible keys of each row in order, and their number."""
    # An eligible key may be infinite (a constant channel) and must precede the ineligible ones.
    limits = torch.finfo(key.dtype)
    key = torch.where(eligible, key.clamp(limits.min, limits.max), torch.inf)
    return key.topk(limit, dim=1, largest=False).indices, eligible.sum(1).clamp_max(limit)
