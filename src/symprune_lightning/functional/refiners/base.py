"""What all refiners are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from symprune_lightning.functional.statistics import Need, Statistics


class MaskRefiner(ABC):
    """Base class of all refiners."""

    needs: ClassVar[frozenset[Need]] = frozenset({"input"})
    """The statistics that the engine has to collect for this refiner."""

    @abstractmethod
    def __call__(
        self, weight: Tensor, mask: Tensor, statistics: Statistics, span: int | None = None
    ) -> Tensor:
        """Improve a mask.

        Several processes share the work by rows, so a refiner looks at one row at a time; what it
        has to know of the other rows is in ``statistics.column_sum``.

        Args:
            weight: Dense ``W``, shape ``(out_features, in_features)``, float32 or float64, or some
                of its rows.
            mask: Bool, same shape, True = kept. Not changed.
            statistics: What was measured of the layer, with everything in ``needs``.
            span: Swaps stay inside groups of so many consecutive inputs (``m`` for N:M); ``None``
                is the whole row.

        Returns:
            A new mask with the same number of kept weights in every such group.
        """
