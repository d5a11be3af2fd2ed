"""Allocations: how the sparsity asked for is divided among layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from symprune_lightning.functional.patterns import Unstructured
from symprune_lightning.functional.statistics import Need, Statistics

MOST = 0.99
"""No layer is pruned further than this by an allocation."""


@dataclass(frozen=True)
class Share:
    """What an allocation may know of a layer.

    Attributes:
        name: The layer's name.
        groups: How many groups of weights it has, each with the layer's sparsity.
        group_size: Weights in a group.
        block: Index of its decoder block, in order.
        depth: 0 in the first block, 1 in the last.
        measured: What the allocation's ``measure`` made of it.
    """

    name: str
    groups: int
    group_size: int
    block: int
    depth: float
    measured: Any = None

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.groups * self.group_size

    def zeros(self, sparsity: float) -> int:
        """How many of them are pruned at a sparsity, which each group rounds down."""
        return self.groups * Unstructured(sparsity).pruned(self.group_size)


class Allocation(ABC):
    """Base class of all allocations."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Statistics of the dense model; any cost one more forward, before pruning."""

    def __call__(self, shares: Sequence[Share], sparsity: float) -> dict[str, float]:
        """Sparsity of each layer, such that as many weights are pruned as without an allocation.

        Every group rounds its zeros down, and the levels are found with that in mind: the total is
        what ``sparsity`` in every layer would give, or above it by one weight of each group in some
        layers.

        Args:
            shares: The layers.
            sparsity: Fraction of zeros over all their weights.

        Raises:
            ValueError: The total can't be met with every layer below 0.99.
        """
        if sparsity > MOST:
            raise ValueError(f"sparsity {sparsity} leaves an allocation nothing to divide")
        levels = _shifted(self.divide(shares, sparsity), shares, sparsity)
        return {share.name: level for share, level in zip(shares, levels, strict=True)}

    def measure(self, weight: Tensor, statistics: Statistics) -> Any:
        """What `divide` has to know of a dense layer; nothing, unless an allocation says.

        Args:
            weight: Dense ``W``, ``(out_features, in_features)``.
            statistics: Of the dense model, with everything in ``needs``.
        """
        return None

    def choices(self) -> Sequence[Allocation]:
        """What is tried out to find the best: itself alone, but for `Search`."""
        return (self,)

    @abstractmethod
    def divide(self, shares: Sequence[Share], sparsity: float) -> list[float]:
        """Sparsity wanted for each layer; all are then shifted alike to meet the total."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity everywhere."""

    def divide(self, shares: Sequence[Share], sparsity: float) -> list[float]:
        """See `Allocation`."""
        return [sparsity] * len(shares)


@dataclass(frozen=True)
class Progression(Allocation):
    """Arithmetic progression over depth, ``s − slope/2`` in the first block to ``s + slope/2``.

    Errors made early pass through all later layers, so early blocks are spared.

    Attributes:
        slope: How much sparser the last block is than the first.

    Raises:
        ValueError: The slope is not between −1 and 1.
    """

    slope: float = 0.2

    def __post_init__(self) -> None:
        if not -1 < self.slope < 1:
            raise ValueError(f"slope is {self.slope}; it must be between -1 and 1")

    def divide(self, shares: Sequence[Share], sparsity: float) -> list[float]:
        """See `Allocation`."""
        return [sparsity + self.slope * (share.depth - 0.5) for share in shares]


@dataclass(frozen=True)
class Search(Allocation):
    """The best of several allocations, by a short search on the calibration data.

    The model is pruned with each by score alone (no refiner, no update), and the one is taken that
    changes the last hidden states least; ``PruneResult.trials`` says what was found. Costs two
    forwards for each and a copy of the weights.

    Attributes:
        candidates: What to try.

    Raises:
        ValueError: There are none.
    """

    candidates: tuple[Allocation, ...] = tuple(Progression(s) for s in (0.0, 0.1, 0.2, 0.3))

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))  # a list from YAML
        if not self.candidates:
            raise ValueError("Search needs at least one allocation to try")

    def choices(self) -> Sequence[Allocation]:
        """See `Allocation`."""
        return self.candidates

    def divide(self, shares: Sequence[Share], sparsity: float) -> list[float]:
        """See `Allocation`; with nothing to go by, that is the first."""
        return self.candidates[0].divide(shares, sparsity)


@dataclass(frozen=True)
class OWL(Allocation):
    """Outlier-weighed layerwise sparsity: Yin et al., arXiv 2310.05175.

    Blocks with more outliers (weights whose Wanda score is over ``m`` times their layer's mean) are
    pruned less, by up to ``λ`` from the mean.

    Attributes:
        lamda: ``λ``, the most that a block's sparsity differs from the mean.
        m: What counts as an outlier.
    """

    lamda: float = 0.08
    m: float = 5.0
    needs: ClassVar[frozenset[Need]] = frozenset({"input"})

    def measure(self, weight: Tensor, statistics: Statistics) -> int:
        """How many outliers the layer has."""
        score = weight.abs() * statistics.input_moments.norm.to(weight.dtype)
        return int((score > self.m * score.mean()).sum())

    def divide(self, shares: Sequence[Share], sparsity: float) -> list[float]:
        """See `Allocation`."""
        counts: dict[int, list[int]] = {}
        for share in shares:
            count = counts.setdefault(share.block, [0, 0])
            count[0] += share.measured
            count[1] += share.weights
        ratios = {block: outliers / total for block, (outliers, total) in counts.items()}
        least, most = min(ratios.values()), max(ratios.values())
        if most == least:
            return [sparsity] * len(shares)
        spread = {b: 2 * self.lamda * (r - least) / (most - least) for b, r in ratios.items()}
        middle = sum(spread.values()) / len(spread)
        return [sparsity - (spread[share.block] - middle) for share in shares]


def _shifted(wanted: Sequence[float], shares: Sequence[Share], sparsity: float) -> list[float]:
    """``wanted`` plus the least constant, within [0, 0.99], that prunes as much as ``sparsity``."""

    def zeros(levels: Sequence[float]) -> int:
        return sum(share.zeros(level) for share, level in zip(shares, levels, strict=True))

    def shifted(constant: float) -> list[float]:
        return [min(max(level + constant, 0.0), MOST) for level in wanted]

    least = zeros([sparsity] * len(shares))
    low, high = -2.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if zeros(shifted(middle)) < least:
            low = middle
        else:
            high = middle
    return shifted(high)
