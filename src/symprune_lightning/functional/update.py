"""Weight updates: change kept weights to compensate for the pruned ones.

Off by default, since pruning with a mask alone keeps the values of the kept weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from symprune_lightning.functional import obs
from symprune_lightning.functional.cg import masked_cg
from symprune_lightning.functional.registry import check_at_least
from symprune_lightning.functional.statistics import Need, Statistics


class WeightUpdate(ABC):
    """Base class of all weight updates.

    A weight update keeps the mask. A method that chooses weights and mask together is a
    [`LayerSolver`][symprune_lightning.functional.solvers.LayerSolver].
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    """Statistics that the engine collects for this update."""

    reference_url: ClassVar[str] = ""
    """Address of the paper, empty without one."""

    @abstractmethod
    def __call__(self, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
        """Change the kept weights.

        Ranks share the work by rows, so each output row is updated independently of the others.

        Args:
            weight: Dense ``W``, ``(out_features, in_features)``, float32 or float64, or a subset of
                its rows. Not modified.
            mask: Bool, same shape, True = kept. Not modified.
            statistics: Statistics of the layer, with everything in ``needs``.

        Returns:
            New weights, same shape and dtype, zero where pruned.
        """


@dataclass(frozen=True)
class OBSUpdate(WeightUpdate):
    """SparseGPT's column sweep for a fixed mask: Frantar & Alistarh, arXiv 2301.00774, alg. 1.

    Columns are visited from left to right; the error of each pruned weight is compensated by the
    weights to its right, by the inverse of ``G + λ·mean(diag G)·I``. Weights that are zero in the
    dense layer stay zero.

    Attributes:
        damping: ``λ``, 0.01 as in the paper. If the matrix cannot be factored, the damping is
            raised tenfold until it can, with a warning.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 0.6]])
        >>> statistics = Statistics(gram=(x.T @ x / 3).double())
        >>> mask = torch.tensor([[False, True]])
        >>> weight = OBSUpdate()(torch.ones(1, 2), mask, statistics)
        >>> weight[0, 0].item(), round(weight[0, 1].item(), 1)
        (0.0, 2.0)
    """

    damping: float = 0.01
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2301.00774"

    def __post_init__(self) -> None:
        check_at_least(0, damping=self.damping)

    def __call__(self, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
        """See `WeightUpdate`."""
        factor = obs.inverse_factor(statistics, self.damping, weight.dtype)

        def fixed(_: Tensor, start: int, stop: int) -> Tensor:
            return mask[:, start:stop]

        updated, _ = obs.sweep(weight, factor, fixed, obs.BLOCK)
        return updated


@dataclass(frozen=True)
class MaskedCG(WeightUpdate):
    """Conjugate gradients on the kept weights: the polish step of ALPS, arXiv 2406.07831.

    Minimises the exact calibrated error ``(W − V)_q G (W − V)_qᵀ`` of every row over its kept
    weights. Unlike the column sweep of [`OBSUpdate`]
    [symprune_lightning.functional.update.OBSUpdate], it converges to the least-squares solution of
    the mask, never raises the error of a row, and needs no factorisation of ``G``. Weights that are
    zero in the dense layer stay zero.

    Attributes:
        steps: Maximum number of steps, each a product with ``G``.
        tolerance: Residual, relative to that of the mask alone, at which a row is finished.

    Raises:
        ValueError: ``steps`` is below 1.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 0.6]])
        >>> statistics = Statistics(gram=(x.T @ x / 3).double())
        >>> weight = MaskedCG()(torch.ones(1, 2), torch.tensor([[False, True]]), statistics)
        >>> weight[0, 0].item(), round(weight[0, 1].item(), 1)
        (0.0, 2.0)
    """

    steps: int = 10
    tolerance: float = 1e-6
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2406.07831"

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps)

    def __call__(self, weight: Tensor, mask: Tensor, statistics: Statistics) -> Tensor:
        """See `WeightUpdate`."""
        # float64: conjugate gradients amplify rounding, on which the masks of later layers would
        # depend otherwise, and with it on how rows are divided among ranks
        dense, kept = weight.double(), mask & (weight != 0)
        start = dense.masked_fill(~kept, 0)
        gram = statistics.gram_matrix
        return masked_cg(dense, start, kept, gram, self.steps, self.tolerance).to(weight.dtype)
