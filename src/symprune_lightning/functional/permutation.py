"""Channel permutation for N:M patterns: Zhang et al., ICLR 2024 (RIA), section 4.

An N:M pattern keeps n of m neighbouring channels, so the mask depends on which channels are
neighbours. Permuting the inputs of a layer, together with the outputs of the layer before it, does
not change the dense model.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 2
"""Maximum number of times that each position of the groups is reassigned."""

CHUNK = 2**24
"""Maximum number of entries of an intermediate tensor."""


def channel_permutation(score: Tensor, n: int, m: int) -> Tensor:
    """Find an order of the inputs in which an N:M mask retains more score.

    The search starts from the heuristic of the paper: channels sorted by their sums are distributed
    over the groups in alternating direction, so that important channels do not compete. Then, for
    one position at a time, the channels at this position of all groups are reassigned to the groups
    by linear sum assignment. No step retains less score than the one before, and the result
    retains at least as much as the original order.

    Args:
        score: ``(out_features, in_features)``, at least 0 where not ``-inf``.
        n: Weights kept in each group.
        m: Size of a group.

    Returns:
        Indices ``(in_features,)``: column ``i`` of the permuted weight is column ``result[i]``.

    Raises:
        ModuleNotFoundError: scipy, whose solver is used, is not installed.

    Examples:
        >>> score = torch.tensor([[9.0, 9.0, 1.0, 1.0], [1.0, 1.0, 9.0, 9.0]])
        >>> order = channel_permutation(score, 1, 2)
        >>> retained_score(score, 1, 2), retained_score(score[:, order], 1, 2)
        (20.0, 36.0)
    """
    score = score.clamp_min(0)
    original = torch.arange(score.shape[1], device=score.device)
    order = max((original, _interleaved(score, m)), key=lambda o: retained_score(score[:, o], n, m))
    for _ in range(ROUNDS):
        before = retained_score(score[:, order], n, m)
        for position in range(m):
            order = reassign_position(score, order, n, m, position)
        if retained_score(score[:, order], n, m) <= before:
            break
    return order


def retained_score(score: Tensor, n: int, m: int) -> float:
    """Return the sum of the scores that an N:M mask keeps."""
    groups = score.reshape(score.shape[0], -1, m)
    return float(groups.topk(n, dim=2).values.double().sum())


def _interleaved(score: Tensor, m: int) -> Tensor:
    """Distribute the channels, sorted by their sums, over the groups in alternating direction."""
    order = score.sum(0).argsort(descending=True, stable=True).reshape(m, -1)
    order[1::2] = order[1::2].flip(1)
    return order.T.reshape(-1)


def reassign_position(score: Tensor, order: Tensor, n: int, m: int, position: int) -> Tensor:
    """Reassign the channels at one position of all groups to maximise the retained score.

    Args:
        score: ``(out_features, in_features)``, at least 0.
        order: Current order of the inputs, ``(in_features,)``.
        n: Weights kept in each group.
        m: Size of a group.
        position: Position within the groups, below `m`.

    Returns:
        New order, ``(in_features,)``.
    """
    groups = order.reshape(-1, m)
    moving = groups[:, position]
    staying = torch.cat([groups[:, :position], groups[:, position + 1 :]], 1)
    # With the other m − 1 channels of a group fixed, a channel only adds the amount by which it
    # exceeds the n-th largest of them. The gains of different groups are therefore independent, and
    # the best reassignment of one position is a linear assignment problem.
    threshold = score[:, staying].topk(n, dim=2).values[:, :, -1]
    gain = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=score.device)
    size = max(1, CHUNK // gain.numel())
    for rows in range(0, len(score), size):
        chunk = slice(rows, rows + size)
        excess = score[chunk][:, moving, None] - threshold[chunk][:, None, :]
        gain += excess.clamp_min(0).sum(0).double()
    groups = groups.clone()
    groups[:, position] = moving[_solve(gain)]
    return groups.reshape(-1)


def _solve(gain: Tensor) -> Tensor:
    """Return the row assigned to each column of ``gain`` so that the sum is maximal."""
    from scipy.optimize import linear_sum_assignment  # NM has checked that it is installed

    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    assignment = torch.empty(len(rows), dtype=torch.long)
    assignment[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return assignment.to(gain.device)
