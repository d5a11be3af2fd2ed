"""What a run gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from symprune_lightning.engine.layers import Layer
from symprune_lightning.functional.allocation import Allocation


class PruningError(RuntimeError):
    """Pruning stopped half-way: some layers are sparse already, the others still dense."""


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: The layer's qualified name.
        shape: ``(out_features, in_features)``.
        asked: Fraction of zeros asked for.
        sparsity: Realised fraction of zeros.
        error: Expected squared change of the output by the first mask, relative to the expected
            squared output (see ``Statistics.squared_error``); ``None`` without input statistics.
        error_refined: The same after refining; equals ``error`` without a refiner.
        error_updated: The same after the weight update; ``None`` without one.
        swaps: Weights that the refiner exchanged.
        tokens: Calibration tokens that reached the layer.
        seconds: Time for scoring, masking and refining.
    """

    name: str
    shape: tuple[int, int]
    asked: float
    sparsity: float
    error: float | None
    error_refined: float | None
    error_updated: float | None
    swaps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """What a search has tried.

    Attributes:
        allocation: How the sparsity was divided.
        error: Squared change of the last hidden states by pruning so, relative to their square.
    """

    allocation: Allocation
    error: float


@dataclass(frozen=True)
class PruneResult:
    """Masks and figures of a run.

    Attributes:
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept, on the CPU.
            Empty for a checkpoint that is streamed: a byte for each weight would be half of what it
            keeps out of memory, and its output is zero where the masks are.
        layers: One report per pruned layer, in the order of pruning.
        permutations: Layer name to the order of its inputs in which its mask is N:M, for patterns
            that permute: ``mask[:, order]``.
        unreached: Prunable layers that no calibration batch came to; they are still dense.
        trials: What a search has tried, best first; empty without one.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    permutations: dict[str, Tensor] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    def holds_in(self, model: nn.Module) -> bool:
        """Whether the model's weights are zero wherever the masks are."""
        for name, mask in self.masks.items():
            weight = Layer(name, model.get_submodule(name)).read()
            if bool((weight.masked_fill(mask.to(weight.device), 0) != 0).any()):
                return False
        return True

    @property
    def sparsity(self) -> float:
        """Realised fraction of zeros over all pruned layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = [layer.sparsity * n for layer, n in zip(self.layers, sizes, strict=True)]
        return sum(map(round, zeros)) / sum(sizes)


OnScores = Callable[[str, Tensor, Tensor], None]
"""Called with a layer's name, its scores and its mask before refining.

Of the rows that this process works on; scores are −∞ where a weight was zero before.
"""

Progress = Callable[[LayerReport, int, int], None]
"""Called after each layer with its report, how many layers are done, and how many there are."""
