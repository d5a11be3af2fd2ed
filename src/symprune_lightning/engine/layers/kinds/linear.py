"""``torch.nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from symprune_lightning.engine.layers.base import Layer, LayerKind, Visit, watch_first_argument


class LinearKind(LayerKind):
    """``nn.Linear`` and its subclasses: the weight is stored as ``(out_features, in_features)``."""

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        return [Layer(name, module, self)] if isinstance(module, nn.Linear) else []

    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return watch_first_argument(module, layers, visit)
