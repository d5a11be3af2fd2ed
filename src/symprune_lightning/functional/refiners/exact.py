"""Swaps that lower the exact calibrated error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.statistics import Need, Statistics

CHUNK = 2**17
"""Weights that are refined together: small enough to stay in a core's cache."""


@dataclass(frozen=True)
class ExactSwap(MaskRefiner):
    """Swaps by the exact calibrated error: SparseSwaps, arXiv 2512.10922.

    The error of row q is ``E_q = r G rᵀ`` with ``r = W_q`` where pruned and 0 elsewhere. Each cycle
    takes one swap in every row and lowers ``E_q``, so the error can only fall. Inside N:M groups
    the best of all pairs is taken. In a whole row these are too many; there the best weight to
    grow on its own is paired with the best to prune beside it, and then with the best to grow
    beside that.

    Attributes:
        cycles: ``T``, most swaps in a row.

    Example:
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
        """Refine the mask of some rows in place; rows that are done are left out as they come."""
        state = _State(weight, mask, gram)
        rows = torch.arange(len(mask), device=mask.device)
        for _ in range(self.cycles):
            change, grown, cut = state.best_in_row() if span is None else state.best_in_group(span)
            better = change < -1e-6 * state.error
            if not better.any():
                break
            if better.float().mean() < 0.9:
                state, rows = state.select(better), rows[better]
                change, grown, cut = change[better], grown[better], cut[better]
                better = better[better]
            state.swap_(better, change, grown, cut)
            mask[rows[better], grown[better]] = True
            mask[rows[better], cut[better]] = False


class _State:
    """Costs of moves in some rows, kept up to date from swap to swap.

    ``cost`` is the change of ``E_q`` if that weight alone changes sides:
    ``W_r² G_rr ± 2 W_r (rG)_r``, + where kept and − where pruned. Of two that change sides, g grown
    and p pruned, the change is ``cost_g + cost_p − 2 W_g W_p G_gp``.
    """

    def __init__(self, weight: Tensor, mask: Tensor, gram: Tensor) -> None:
        removed = weight.masked_fill(mask, 0)
        product = removed @ gram
        self.gram = gram
        self.weight = weight
        self.twice = 2 * weight
        self.kept = mask.clone()
        self.error = (product * removed).sum(1)
        self.own = (weight.square() * gram.diagonal()).masked_fill_(weight == 0, torch.inf)
        self.pull = self.twice * product

    def select(self, rows: Tensor) -> _State:
        """The same for some rows only."""
        selected = object.__new__(_State)
        selected.gram = self.gram
        for name in ("weight", "twice", "kept", "error", "own", "pull"):
            setattr(selected, name, getattr(self, name)[rows])
        return selected

    def best_in_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Change of the error, column grown, column cut; each ``(rows,)``."""
        rows = torch.arange(len(self.weight), device=self.weight.device)
        cost = torch.where(self.kept, self.own + self.pull, self.own - self.pull)
        growing = cost.masked_fill(self.kept, torch.inf)
        cutting = cost.masked_fill_(~self.kept, torch.inf)
        grown = growing.argmin(1)
        change, cut = (cutting - self._together(rows, grown)).min(1)
        beside = growing - self._together(rows, cut)
        change, grown = (beside + cutting[rows, cut, None]).min(1)
        return change, grown, cut

    def best_in_group(self, span: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same, of pairs inside groups of ``span`` inputs, all of which are looked at."""
        rows, columns = self.weight.shape
        cost = torch.where(self.kept, self.own + self.pull, self.own - self.pull)
        column = torch.arange(columns, device=cost.device)
        best = cost.new_full((rows,), torch.inf)
        grown, cut = (
            torch.zeros_like(best, dtype=torch.long),
            torch.zeros_like(best, dtype=torch.long),
        )
        for shift in range(1, span):
            partner = column - column % span + (column + shift) % span
            together = self.twice * self.weight[:, partner] * self.gram[column, partner]
            change = cost + cost[:, partner] - together
            change.masked_fill_(self.kept | ~self.kept[:, partner], torch.inf)
            value, at = change.min(1)
            lower = value < best
            best = torch.where(lower, value, best)
            grown = torch.where(lower, at, grown)
            cut = torch.where(lower, partner[at], cut)
        return best, grown, cut

    def swap_(self, better: Tensor, change: Tensor, grown: Tensor, cut: Tensor) -> None:
        """Take the swaps of the rows that are better for it."""
        rows = torch.arange(len(self.weight), device=self.weight.device)
        w_grown = (self.weight[rows, grown] * better)[:, None]
        w_cut = (self.weight[rows, cut] * better)[:, None]
        step = w_cut * self.gram[cut] - w_grown * self.gram[grown]
        self.pull.addcmul_(self.twice, step)
        self.error = self.error + change * better
        self.kept[rows[better], grown[better]] = True
        self.kept[rows[better], cut[better]] = False

    def _together(self, rows: Tensor, column: Tensor) -> Tensor:
        """``2 W_c W_r G_cr`` for one column c of each row and all r."""
        return self.gram[column].mul_(self.twice).mul_(self.weight[rows, column, None])
