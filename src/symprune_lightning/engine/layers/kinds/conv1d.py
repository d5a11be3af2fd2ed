"""``Conv1D`` of transformers, as in GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer, LayerKind, Visit, watch_first_argument


def _transpose(parameter: Tensor) -> Tensor:
    return parameter.T


class Conv1DKind(LayerKind):
    """transformers' ``Conv1D``: a linear layer whose weight is stored as ``(in, out)``."""

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        # matched by name, so that the engine does not import transformers
        classes = [(c.__module__, c.__name__) for c in type(module).__mro__]
        if ("transformers.pytorch_utils", "Conv1D") not in classes:
            return []
        return [Layer(name, module, self, view=_transpose)]

    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return watch_first_argument(module, layers, visit)
