"""Patterns: which weights compete with each other, and how many of each group are kept.

A pattern is a budget. The mask, the number of zeros and the window within which a refiner may swap
all follow from its groups and from the number of weights pruned in each.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from symprune_lightning.functional.registry import checked_instance
from symprune_lightning.functional.selection import kth_lowest

Group = Literal["output", "input", "layer", "block", "model"]
"""Comparison group: the weights of one output channel, of one input channel, of one layer, of all
layers of a decoder block, or of all layers."""


class Pattern(ABC):
    """Base class of all patterns."""

    sparsity: float
    """Target fraction of zeros, in ``[0, 1)``."""

    group: Group = "output"
    """Smallest comparison group that contains a group of the pattern: ``"output"`` for N:M, whose
    groups lie within one row."""

    reference_url: ClassVar[str] = ""
    """Address of the paper, empty without one."""

    @abstractmethod
    def check(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` if a weight of this shape cannot have the pattern."""

    @abstractmethod
    def groups(self, x: Tensor) -> Tensor:
        """Arrange ``x`` of shape ``(out_features, in_features)`` as ``(groups, group_size)``."""

    @abstractmethod
    def ungroup(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Invert `groups`: arrange ``(groups, group_size)`` as ``shape``."""

    @abstractmethod
    def num_pruned(self, group_size: int) -> int:
        """Return the number of weights that are pruned in a group."""

    @abstractmethod
    def swap_window(self) -> int | None:
        """Return the window of consecutive inputs within which swaps keep every group's budget.

        Returns:
            Number of inputs, or ``None`` for the whole row.

        Raises:
            ValueError: Swaps within a row break the budget.
        """

    def mask(self, score: Tensor) -> Tensor:
        """Keep the weights with the highest scores in each group.

        Ties: the weight that comes first in its group is pruned first (within a row, the one with
        the smaller column index), as with a stable ascending sort.

        Args:
            score: Shape ``(out_features, in_features)``, no NaN.

        Returns:
            Bool mask of the same shape, True = kept.

        Raises:
            ValueError: The shape cannot have this pattern.

        Examples:
            >>> score = torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 9.0, 9.0, 9.0]])
            >>> Unstructured(0.5).mask(score).int().tolist()
            [[0, 1, 0, 1], [0, 0, 1, 1]]
            >>> Unstructured(0.5, group="layer").mask(score).int().tolist()
            [[0, 0, 0, 0], [1, 1, 1, 1]]
        """
        self.check(score.shape)
        grouped = self.groups(score)
        kept = keep_highest(grouped, self.num_pruned(grouped.shape[1]))
        return self.ungroup(kept, score.shape)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """``floor(group_size · sparsity)`` weights are pruned in each group.

    Attributes:
        sparsity: Target fraction of zeros, in ``[0, 1)``. The realised fraction is lower where
            the group size is not a multiple: 0.7 of 32 is rounded down to 22, a fraction of 0.6875.
        group: ``"output"`` (each row, the default, as in Wanda), ``"input"`` (each column),
            ``"layer"`` (the whole matrix), ``"block"`` or ``"model"`` (the matrices of a decoder
            block or of all layers, which the engine concatenates).

    Raises:
        ValueError: The sparsity is out of range or the group unknown.
    """

    sparsity: float = 0.5
    group: Group = "output"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity is {self.sparsity}, but it is the fraction of weights to prune and must "
                f"be at least 0 and below 1; for fifty percent write 0.5"
            )
        if self.group not in get_args(Group):
            raise ValueError(f"group is {self.group!r}; choose one of {', '.join(get_args(Group))}")

    def check(self, shape: torch.Size) -> None:
        """Accept any shape."""

    def groups(self, x: Tensor) -> Tensor:
        """See `Pattern`."""
        if self.group == "output":
            return x
        return x.T.contiguous() if self.group == "input" else x.reshape(1, -1)

    def ungroup(self, x: Tensor, shape: torch.Size) -> Tensor:
        """See `Pattern`."""
        return x.T.contiguous() if self.group == "input" else x.reshape(shape)

    def num_pruned(self, group_size: int) -> int:
        """See `Pattern`."""
        # the tolerance is for products such as 100 · 0.29 = 28.999999999999996
        return math.floor(group_size * self.sparsity + 1e-9)

    def swap_window(self) -> int | None:
        """See `Pattern`."""
        if self.group == "input":
            raise ValueError(
                "refiners swap weights within rows, which breaks the budget of group 'input'; use "
                "group 'output' or 'layer', or refine=None"
            )
        return None


@dataclass(frozen=True)
class NM(Pattern):
    """N:M: of every ``m`` consecutive inputs of a row, ``n`` are **kept** ("2:4" keeps 2 of 4).

    Mishra et al., arXiv 2104.08378, describe the hardware support for 2:4.

    Attributes:
        n: Weights kept in each group.
        m: Size of a group along the input dimension.
        permute: Search for an order of the inputs in which the pattern keeps more score (see
            ``channel_permutation``). The mask is in the model's original order; with its columns
            in the order of ``PruneResult.permutations``, it is N:M.

    Raises:
        ModuleNotFoundError: ``permute`` needs scipy, which is not installed.
        ValueError: Not ``0 < n < m``.

    Examples:
        >>> NM(2, 4).mask(torch.tensor([[1.0, 4.0, 2.0, 3.0]])).int().tolist()
        [[0, 1, 0, 1]]
    """

    n: int
    m: int
    permute: bool = False
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2104.08378"

    def __post_init__(self) -> None:
        if self.permute and find_spec("scipy") is None:
            raise ModuleNotFoundError(
                "channel permutation uses scipy: pip install 'symprune-lightning[permute]'"
            )
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern {self.n}:{self.m} must keep n of m inputs with 0 < n < m")

    def check(self, shape: torch.Size) -> None:
        """See `Pattern`."""
        if shape[1] % self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} does not divide {shape[1]} inputs into groups of "
                f"{self.m}; choose another pattern or name the layer in `ignore`"
            )

    def groups(self, x: Tensor) -> Tensor:
        """See `Pattern`."""
        return x.reshape(-1, self.m)

    def ungroup(self, x: Tensor, shape: torch.Size) -> Tensor:
        """See `Pattern`."""
        return x.reshape(shape)

    def num_pruned(self, group_size: int) -> int:
        """See `Pattern`."""
        return self.m - self.n

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        """Fraction of zeros."""
        return 1 - self.n / self.m

    def swap_window(self) -> int | None:
        """See `Pattern`."""
        return self.m


def resolve_pattern(
    pattern: Pattern | str | None, *, sparsity: float = 0.5, group: Group = "output"
) -> Pattern:
    """Return `pattern` as an instance, or an unstructured pattern if it is ``None``.

    Args:
        pattern: A pattern, a string such as ``"2:4"``, or ``None``.
        sparsity: Sparsity of the unstructured pattern.
        group: Comparison group of the unstructured pattern.

    Raises:
        ValueError: The string is not of the form ``"N:M"``, or a value is out of range.
        TypeError: It is neither a string nor a pattern.

    Examples:
        >>> resolve_pattern("2:4")
        NM(n=2, m=4, permute=False)
        >>> resolve_pattern(None, sparsity=0.6)
        Unstructured(sparsity=0.6, group='output')
    """
    if pattern is None:
        return Unstructured(sparsity, group)
    if not isinstance(pattern, str):
        return checked_instance(Pattern, pattern)  # type: ignore[type-abstract]
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f"pattern is {pattern!r}; write it as 'N:M', for example '2:4'")
    return NM(int(match[1]), int(match[2]))


def keep_highest(score: Tensor, pruned: int) -> Tensor:
    """Return the mask of all but the lowest scores of each row, True = kept.

    Ties: the first of equal scores are pruned.

    Args:
        score: ``(rows, columns)``, no NaN.
        pruned: Number of scores to prune per row, below the number of columns.

    Examples:
        >>> keep_highest(torch.tensor([[2.0, 1.0, 1.0]]), 1).tolist()
        [[True, False, True]]
    """
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kth_lowest(score, pruned)
    kept = score > threshold
    # A threshold is several times faster than a stable sort, but one that occurs more than once
    # leaves too few weights: in those rows, keep the last of the equal scores.
    missing = score.shape[1] - pruned - kept.count_nonzero(1)
    tied = missing.nonzero()[:, 0]
    if len(tied):
        equal = score[tied] == threshold[tied]
        from_the_end = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
        kept[tied] |= equal & (from_the_end <= missing[tied, None])
    return kept
