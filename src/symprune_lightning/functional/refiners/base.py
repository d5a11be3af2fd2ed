"""Base class of mask refiners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from symprune_lightning.functional.statistics import Need, Statistics


class MaskRefiner(ABC):
    """Base class of all refiners."""

    needs: ClassVar[frozenset[Need]] = frozenset({"input"})
    """Statistics that the engine collects for this refiner."""

    reference_url: ClassVar[str] = ""
    """Address of the paper, empty without one."""

    @abstractmethod
    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, window: int | None = None
    ) -> Tensor:
        """Improve a mask.

        Ranks share the work by rows, so each output row is refined independently of the others;
        the only property of the other rows that a refiner can use is ``statistics.column_sum``.

        Args:
            weight: Dense ``W``, ``(out_features, in_features)``, float32 or float64, or a subset of
                its rows. Not modified.
            mask: Bool, same shape, True = kept. Not modified.
            statistics: Statistics of the layer, with everything in ``needs``.
            window: Swaps stay within groups of this number of consecutive inputs (``m`` for N:M);
                ``None`` for the whole row.

        Returns:
            A new mask with the same number of kept weights in every such group. Weights that are
            zero and pruned stay pruned.
        """
