"""Results of a pruning run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from symprune_lightning.engine.layers.match import match_layers
from symprune_lightning.functional.allocation import Allocation
from symprune_lightning.functional.packing import PackedMasks

NOTICEABLE_ZEROS = 0.01
"""Fraction of zeros before pruning from which a model counts as sparse."""


@dataclass(frozen=True)
class LayerReport:
    """Figures of one pruned layer.

    Attributes:
        name: Qualified name of the layer.
        shape: ``(out_features, in_features)``.
        target_sparsity: Requested fraction of zeros.
        sparsity: Realised fraction of zeros.
        error: Expected squared change of the output by the initial mask, relative to the expected
            squared output (see ``Statistics.squared_error``); ``None`` without input statistics.
        error_refined: The same after refining; equals ``error`` without a refiner.
        error_updated: The same after the weight update; ``None`` without one.
        swaps: Number of weights that refiners exchanged.
        tokens: Number of calibration tokens that reached the layer.
        seconds: Time for scoring, masking, refining and updating.
        initial_sparsity: Fraction of zeros before pruning.
    """

    name: str
    shape: tuple[int, int]
    target_sparsity: float
    sparsity: float
    error: float | None
    error_refined: float | None
    error_updated: float | None
    swaps: int
    tokens: int
    seconds: float
    initial_sparsity: float = 0.0

    @property
    def num_weights(self) -> int:
        """Number of weights of the layer."""
        return self.shape[0] * self.shape[1]

    @property
    def final_error(self) -> float | None:
        """The relative error of the final weights; ``None`` without input statistics."""
        return self.error_refined if self.error_updated is None else self.error_updated

    @property
    def num_zeros(self) -> int:
        """Number of pruned weights of the layer."""
        return round(self.sparsity * self.num_weights)


@dataclass(frozen=True)
class LayerRecord:
    """Everything that pruning one layer produced; enough to repeat it on the dense layer.

    Attributes:
        report: Figures.
        mask: Bool, ``(out_features, in_features)``, True = kept.
        weight: New weight, if a weight update or a solver changed it.
        channel_order: Order of the inputs in which the mask is N:M, if it was permuted.
    """

    report: LayerReport
    mask: Tensor
    weight: Tensor | None
    channel_order: Tensor | None


@dataclass(frozen=True)
class BlockReport:
    """Figures of one reconstructed block.

    Errors are dimensionless: the mean over tokens of ``‖output − target‖² / ‖target‖²``, on the
    held-out batches.

    Attributes:
        name: Qualified name of the block.
        error: Error before training.
        error_reconstructed: Lowest error; equals ``error`` if no epoch lowered it, in which case
            the weights are unchanged.
        errors: Error before training and after each epoch.
        learning_rate: Learning rate, relative to the root mean square of each tensor.
        steps: Number of optimizer steps.
        seconds: Time for training.
    """

    name: str
    error: float
    error_reconstructed: float
    errors: list[float]
    learning_rate: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class BlockRecord:
    """Everything that reconstructing one block produced.

    Attributes:
        report: Figures.
        parameters: Parameter name within the block to its new value; empty if it is unchanged.
    """

    report: BlockReport
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One candidate of a search over allocations.

    Attributes:
        allocation: The candidate.
        error: Squared change of the last hidden states when the model is pruned with it, relative
            to their squared norm.
    """

    allocation: Allocation
    error: float


@dataclass(frozen=True)
class DenseWeight:
    """A weight that was left dense, in full or in part.

    Attributes:
        name: Qualified name of the parameter.
        shape: Its stored shape.
        num_weights: Number of its entries that belong to no pruned layer.
        reason: Why: ``"ignored"``, ``"router"``, not reached, no layer.
        is_intended: Whether the settings exclude it, or a warning of its own has named it.
        in_block: Whether it is in a decoder block, and so counted by ``PruneResult.coverage``.
    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    reason: str
    is_intended: bool
    in_block: bool


@dataclass
class CoverageCounts:
    """Numbers of weights of the decoder blocks, in matrices and larger tensors.

    Attributes:
        pruned: Weights of pruned layers, zero or not.
        total: All weights.
    """

    pruned: int = 0
    total: int = 0


@dataclass(frozen=True)
class PruneResult:
    """Masks and figures of a run.

    Attributes:
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept. Stored as
            packed bits on the CPU and unpacked on access.
        layers: One report per pruned layer, in the order of pruning.
        permutations: Layer name to the order of its inputs in which its mask is N:M, for patterns
            that permute: ``mask[:, order]``.
        unreached: Prunable layers that no calibration batch reached; they are still dense.
        pruned_by_magnitude: Layers that no calibration batch reached, pruned by magnitude.
        all_zero: Layers that were all zero before, such as adapters; they were left alone.
        trials: Candidates of a search over allocations, best first; empty without a search.
        blocks: One report per reconstructed block, in order; empty without reconstruction.
        left_dense: Weights that were left dense, without embeddings and vectors, largest first.
        coverage_counts: Numbers of weights behind ``coverage``.
    """

    masks: PackedMasks = field(default_factory=PackedMasks)
    layers: list[LayerReport] = field(default_factory=list)
    permutations: dict[str, Tensor] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    pruned_by_magnitude: list[str] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    left_dense: list[DenseWeight] = field(default_factory=list)
    coverage_counts: CoverageCounts = field(default_factory=CoverageCounts)

    def __repr__(self) -> str:
        return f"PruneResult({len(self.layers)} layers, sparsity {self.sparsity:.4f})"

    def is_applied_to(self, model: nn.Module) -> bool:
        """Return whether the model's weights are zero wherever the masks prune.

        Raises:
            ValueError: The model is not the one that was pruned, such as a module around it.
        """
        for layer in match_layers(model, self.masks):
            weight = layer.matrix()
            mask = self.masks[layer.name].to(weight.device)
            if bool((weight.masked_fill(mask, 0) != 0).any()):
                return False
        return True

    @property
    def coverage(self) -> float:
        """Fraction of the weights of the decoder blocks that belong to pruned layers.

        Of the whole model, if it has no blocks. Counts matrices and larger tensors, without
        embeddings; ``left_dense`` names the rest.
        """
        return self.coverage_counts.pruned / max(self.coverage_counts.total, 1)

    @property
    def sparsity(self) -> float:
        """Realised fraction of zeros over all pruned layers; 0 if there are none."""
        weights = sum(report.num_weights for report in self.layers)
        return sum(report.num_zeros for report in self.layers) / max(weights, 1)

    @property
    def initial_sparsity(self) -> float:
        """Fraction of zeros in these layers before pruning; 0 if there are none."""
        weights = sum(report.num_weights for report in self.layers)
        zeros = sum(report.initial_sparsity * report.num_weights for report in self.layers)
        return zeros / max(weights, 1)

    @property
    def sparse_start(self) -> str:
        """A sentence that says that the model was sparse before; empty if it was dense."""
        return describe_sparse_start(self.initial_sparsity, self.sparsity)


def describe_sparse_start(before: float, after: float) -> str:
    """Describe a model that was sparse before it was pruned; empty if it was dense.

    Args:
        before: Fraction of zeros in the pruned layers before pruning.
        after: The same after pruning.

    Examples:
        >>> describe_sparse_start(0.0, 0.5)
        ''
        >>> describe_sparse_start(0.5, 0.5)[-43:]
        'sparse model; no further weight was pruned.'
    """
    if before < NOTICEABLE_ZEROS:
        return ""
    text = (
        f"{before:.1%} of the weights of these layers were zero before pruning, so that figures of "
        f"the dense model are those of this sparse model"
    ).replace("%", " %", 1)
    return text + ("; no further weight was pruned." if after - before < 1e-4 else ".")
