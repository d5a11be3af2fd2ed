"""Channel permutation for N:M patterns: Zhang et al., ICLR 2024 (RIA), section 4.

An N:M pattern keeps n of m neighbours, so it matters which channels are neighbours. Permuting the
inputs of a layer (and with it the outputs of the layer before) changes nothing but that.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 2
"""How often every position of the groups is assigned anew."""

CHUNK = 2**24
"""Most entries of an intermediate result."""


def channel_permutation(score: Tensor, n: int, m: int) -> Tensor:
    """An order of the inputs in which an N:M mask retains more score than in the given one.

    First the heuristic of the paper: channels sorted by their sums are dealt out to the groups in
    turn, back and forth, so that important channels don't compete. Then, position by position, the
    channel of every group is assigned anew by the linear sum assignment that retains most. Each
    step retains at least what the one before did, and the given order is kept if it is best.

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
    given = torch.arange(score.shape[1], device=score.device)
    dealt = _dealt(score, m)
    order = max((given, dealt), key=lambda o: retained_score(score[:, o], n, m))
    for _ in range(ROUNDS):
        before = retained_score(score[:, order], n, m)
        for position in range(m):
            order = _assigned(score, order, n, m, position)
        if retained_score(score[:, order], n, m) <= before:
            break
    return order


def retained_score(score: Tensor, n: int, m: int) -> float:
    """Sum of the scores that an N:M mask keeps."""
    groups = score.reshape(score.shape[0], -1, m)
    return float(groups.topk(n, dim=2).values.double().sum())


def _dealt(score: Tensor, m: int) -> Tensor:
    order = score.sum(0).argsort(descending=True, stable=True).reshape(m, -1)
    order[1::2] = order[1::2].flip(1)
    return order.T.reshape(-1)


def _assigned(score: Tensor, order: Tensor, n: int, m: int, position: int) -> Tensor:
    """Assign the channels at one position of all groups to the groups where they retain most."""
    groups = order.reshape(-1, m)
    moving = groups[:, position]
    staying = torch.cat([groups[:, :position], groups[:, position + 1 :]], 1)
    # beside the others of a group, a channel adds what it has above the n-th largest of them
    others = score[:, staying]
    bar = others.topk(n, dim=2).values[:, :, -1]
    gain = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=score.device)
    size = max(1, CHUNK // gain.numel())
    for rows in range(0, len(score), size):
        part = slice(rows, rows + size)
        above = score[part][:, moving, None] - bar[part][:, None, :]
        gain += above.clamp_min(0).sum(0).double()
    groups = groups.clone()
    groups[:, position] = moving[_solve(gain)]
    return groups.reshape(-1)


def _solve(gain: Tensor) -> Tensor:
    """For each column of ``gain`` the row assigned to it, so that the sum is largest."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "channel permutation uses scipy: pip install 'symprune-lightning[permute]'"
        ) from error
    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    assigned = torch.empty(len(rows), dtype=torch.long)
    assigned[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return assigned.to(gain.device)
