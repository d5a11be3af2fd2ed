"""Allocations: divide one target sparsity among layers.

Longer than 300 lines to keep all allocations side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from symprune_lightning.functional.patterns import Unstructured
from symprune_lightning.functional.statistics import Need, Statistics

MAX_SPARSITY = 0.99
"""Upper bound on the sparsity that an allocation assigns to a layer."""


@dataclass(frozen=True)
class LayerInfo:
    """Per-layer information available to an allocation.

    Attributes:
        name: Layer name.
        groups: Number of groups of weights; each is pruned to the layer's sparsity.
        group_size: Weights per group.
        block: Index of the decoder block.
        depth: Relative position of the block, 0 for the first and 1 for the last.
        metric: Result of the allocation's ``layer_metric``.
    """

    name: str
    groups: int
    group_size: int
    block: int
    depth: float
    metric: Any = None

    @property
    def num_weights(self) -> int:
        """Number of weights of the layer."""
        return self.groups * self.group_size

    def num_pruned(self, sparsity: float) -> int:
        """Return the number of weights pruned at a sparsity, rounded down in each group."""
        return self.groups * Unstructured(sparsity).num_pruned(self.group_size)


class AllocationMethod(ABC):  # noqa: B024
    """Common base of `Allocation` and `Search`, for the registry only.

    Users select either with the same argument, ``allocation=``, so names of both are looked up
    among the subclasses of this class. They share no behaviour: an allocation computes
    sparsities, while a search has the engine prune the model with each of several allocations.
    """

    reference_url: ClassVar[str] = ""
    """Address of the paper, empty without one."""


class Allocation(AllocationMethod):
    """Base class of all allocations."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Statistics of the dense model; if there are any, pruning takes one more forward pass."""

    uses_scores: ClassVar[bool] = False
    """Whether ``layer_metric`` uses the scores by which the layer is going to be pruned."""

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float]:
        """Return the sparsity of each layer.

        The number of pruned weights is that of the same `sparsity` in every layer or slightly
        above: since every group rounds down, the closest total above may exceed it by one weight
        per group in some layers.

        Args:
            layers: The layers, at least one.
            sparsity: Fraction of zeros over the weights of all layers, at most 0.99.

        Returns:
            Layer name to sparsity, between 0 and 0.99.

        Raises:
            ValueError: `sparsity` is above 0.99.
        """
        if sparsity > MAX_SPARSITY:
            raise ValueError(
                f"sparsity is {sparsity}; an allocation needs at most {MAX_SPARSITY} to have "
                f"weights to divide"
            )
        sparsities = _shifted(self.layer_sparsities(layers, sparsity), layers, sparsity)
        return {layer.name: s for layer, s in zip(layers, sparsities, strict=True)}

    def layer_metric(
        self, weight: Tensor, statistics: Statistics, scores: Tensor | None = None
    ) -> Any:
        """Measure a dense layer; the result is `LayerInfo.metric` in ``layer_sparsities``.

        Args:
            weight: Dense ``W``, ``(out_features, in_features)``. Not modified.
            statistics: Statistics of the dense model, with everything in ``needs``.
            scores: Scores of the dense weight, same shape, if ``uses_scores``; the lowest of each
                row are pruned first. ``None`` for those of Wanda.

        Returns:
            Any value that pickles; ``None`` unless overridden.
        """
        return None

    @abstractmethod
    def layer_sparsities(self, layers: Sequence[LayerInfo], sparsity: float) -> list[float]:
        """Return the desired sparsity of each layer.

        ``__call__`` shifts all of them by one constant to meet the total, so only the differences
        matter, and clamps them.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every layer.

    Examples:
        >>> layers = [LayerInfo(str(i), 8, 100, block=i, depth=i / 2) for i in range(3)]
        >>> {name: round(s, 3) for name, s in Uniform()(layers, 0.5).items()}
        {'0': 0.5, '1': 0.5, '2': 0.5}
    """

    def layer_sparsities(self, layers: Sequence[LayerInfo], sparsity: float) -> list[float]:
        """See `Allocation`."""
        return [sparsity] * len(layers)


@dataclass(frozen=True)
class Progression(Allocation):
    """Arithmetic progression over depth, ``s − slope/2`` in the first block to ``s + slope/2``.

    Errors made early propagate through all later layers, so early blocks are pruned less.

    Attributes:
        slope: Sparsity of the last block minus sparsity of the first, between −1 and 1.

    Raises:
        ValueError: The slope is out of range.

    Examples:
        >>> layers = [LayerInfo(str(i), 8, 100, block=i, depth=i / 2) for i in range(3)]
        >>> {name: round(s, 3) for name, s in Progression()(layers, 0.5).items()}
        {'0': 0.4, '1': 0.5, '2': 0.6}
    """

    slope: float = 0.2

    def __post_init__(self) -> None:
        if not -1 < self.slope < 1:
            raise ValueError(f"slope is {self.slope}; it must be between -1 and 1")

    def layer_sparsities(self, layers: Sequence[LayerInfo], sparsity: float) -> list[float]:
        """See `Allocation`."""
        return [sparsity + self.slope * (layer.depth - 0.5) for layer in layers]


@dataclass(frozen=True)
class OWL(Allocation):
    """Outlier-weighed layerwise sparsity: Yin et al., arXiv 2310.05175.

    Blocks with a higher ratio of outliers are pruned less. An outlier is a weight whose Wanda score
    is more than ``M`` times the mean score of its layer.

    Attributes:
        max_deviation: ``λ``, maximum difference between a block's sparsity and the mean. 0.08 as in
            the paper.
        outlier_threshold: ``M``, multiple of a layer's mean score above which a weight is an
            outlier. 5 as in the paper.

    Examples:
        >>> layers = [LayerInfo(str(i), 8, 100, block=i, depth=i, metric=9 * i) for i in range(2)]
        >>> {name: round(s, 3) for name, s in OWL()(layers, 0.5).items()}
        {'0': 0.58, '1': 0.42}
    """

    max_deviation: float = 0.08
    outlier_threshold: float = 5.0
    needs: ClassVar[frozenset[Need]] = frozenset({"input"})
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2310.05175"

    def __post_init__(self) -> None:
        _check_deviation(self.max_deviation)

    def layer_metric(
        self, weight: Tensor, statistics: Statistics, scores: Tensor | None = None
    ) -> int:
        """Return the number of outliers of the layer."""
        score = weight.abs() * statistics.input_moments.norm.to(weight.dtype)
        return int((score > self.outlier_threshold * score.mean()).sum())

    def layer_sparsities(self, layers: Sequence[LayerInfo], sparsity: float) -> list[float]:
        """See `Allocation`."""
        outliers: dict[int, int] = {}
        weights: dict[int, int] = {}
        for layer in layers:
            outliers[layer.block] = outliers.get(layer.block, 0) + layer.metric
            weights[layer.block] = weights.get(layer.block, 0) + layer.num_weights
        ratios = {block: count / weights[block] for block, count in outliers.items()}
        lowest, highest = min(ratios.values()), max(ratios.values())
        if highest == lowest:
            return [sparsity] * len(layers)
        scale = 2 * self.max_deviation
        spread = {b: scale * (r - lowest) / (highest - lowest) for b, r in ratios.items()}
        mean = sum(spread.values()) / len(spread)
        return [sparsity - (spread[layer.block] - mean) for layer in layers]


@dataclass(frozen=True)
class Sensitivity(Allocation):
    """Sparsity by the estimated increase of the loss, comparable between layers.

    Removing weight (q, r) raises the loss by about ``½·F_q·W²·E[x_r²]`` per token, with
    ``F_q = E[(∂L/∂y_q)²]`` from one backward pass of the dense model. For each layer, ``e(k)`` is
    the mean of this over the k-th pruned weights of all rows, in the order of the score in use. All
    layers are pruned to the same level of ``e``, at which the model has the requested sparsity, and
    each at most by ``max_deviation`` more or less than the mean.

    Ours. Layers whose output matters little (queries, gates) are pruned most.

    Attributes:
        max_deviation: ``d``, maximum difference between a layer's sparsity and the mean.

    Raises:
        ValueError: ``max_deviation`` is not between 0 and 1.

    Examples:
        >>> curves = [torch.arange(1.0, 101) * scale for scale in (1, 2)]
        >>> layers = [LayerInfo(str(i), 8, 100, 0, 0.0, curve) for i, curve in enumerate(curves)]
        >>> {name: round(s, 2) for name, s in Sensitivity()(layers, 0.6).items()}
        {'0': 0.8, '1': 0.4}
    """

    max_deviation: float = 0.2
    needs: ClassVar[frozenset[Need]] = frozenset({"input", "output_gradient"})
    uses_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_deviation(self.max_deviation)

    def layer_metric(
        self, weight: Tensor, statistics: Statistics, scores: Tensor | None = None
    ) -> Tensor:
        """Return the curve ``e(k)`` of a layer, non-decreasing, ``(in_features,)``, float64."""
        energy = (statistics.input_moments.total_square / statistics.input_moments.tokens).float()
        loss = weight.float().square() * energy * statistics.output_sensitivity.float()[:, None]
        if scores is None:
            scores = weight.float().abs() * energy.sqrt()
        curve = loss.gather(1, scores.argsort(dim=1)).mean(0, dtype=torch.float64).cpu()
        # single positions are noisy where the score and the loss disagree: a running mean over 2 %
        # of them first, or the running maximum would follow the outliers
        size = max(1, len(curve) // 50)
        padded = torch.cat([curve[:1].expand(size - 1), curve])
        return padded.unfold(0, size, 1).mean(1).cummax(0).values

    def layer_sparsities(self, layers: Sequence[LayerInfo], sparsity: float) -> list[float]:
        """See `Allocation`."""
        low, high = sparsity - self.max_deviation, sparsity + self.max_deviation
        curves = [layer.metric for layer in layers]
        sizes = [layer.num_weights for layer in layers]
        levels = torch.cat(curves).sort().values

        def sparsities(level: float) -> list[float]:
            fractions = [float((curve <= level).double().mean()) for curve in curves]
            return [min(max(fraction, low), high) for fraction in fractions]

        first, last = 0, len(levels) - 1
        while first < last:
            middle = (first + last) // 2
            pruned = zip(sparsities(float(levels[middle])), sizes, strict=True)
            if sum(fraction * size for fraction, size in pruned) < sparsity * sum(sizes):
                first = middle + 1
            else:
                last = middle
        return sparsities(float(levels[first]))


@dataclass(frozen=True)
class Search(AllocationMethod):
    """The best of several allocations, by a short search on the calibration data.

    The model is pruned with each candidate by score alone (no refiner, no update), and the
    candidate that changes the last hidden states least is used; ``PruneResult.trials`` has the
    errors of all. The search takes two forward passes per candidate and a copy of the weights.

    Attributes:
        candidates: Allocations to try, by default progressions with slope 0, 0.1, 0.2 and 0.3.

    Raises:
        ValueError: There is no candidate.
        TypeError: A candidate is not an `Allocation`.
    """

    candidates: tuple[Allocation, ...] = tuple(Progression(s) for s in (0.0, 0.1, 0.2, 0.3))

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))  # YAML gives a list
        if not self.candidates:
            raise ValueError("Search needs at least one allocation to try")
        for candidate in self.candidates:
            if not isinstance(candidate, Allocation):
                raise TypeError(f"Search tries allocations, and {candidate!r} is none")


def _check_deviation(max_deviation: float) -> None:
    if not 0 < max_deviation < 1:
        raise ValueError(f"max_deviation is {max_deviation}; it must be between 0 and 1")


def _shifted(desired: Sequence[float], layers: Sequence[LayerInfo], sparsity: float) -> list[float]:
    """Add the smallest constant to `desired`, within [0, 0.99], that prunes enough weights.

    Enough is the number of weights that `sparsity` in every layer prunes.
    """

    def num_pruned(sparsities: Sequence[float]) -> int:
        return sum(layer.num_pruned(s) for layer, s in zip(layers, sparsities, strict=True))

    def shifted(constant: float) -> list[float]:
        return [min(max(s + constant, 0.0), MAX_SPARSITY) for s in desired]

    # The total is a step function of the constant (groups round down, and layers are clamped), so
    # there is no closed form; 60 bisections reach the resolution of a float.
    target = num_pruned([sparsity] * len(layers))
    low, high = -2.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if num_pruned(shifted(middle)) < target:
            low = middle
        else:
            high = middle
    return shifted(high)
