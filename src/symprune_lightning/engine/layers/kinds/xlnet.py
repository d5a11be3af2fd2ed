"""The attention projections of XLNet, which are parameters in three dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.stand_in import WatchedParameter
from symprune_lightning.engine.layers.stand_in_kind import StandInKind

INPUT_PROJECTIONS = ("q", "k", "v", "r")
OUTPUT_PROJECTION = "o"


def _input_projection(parameter: Tensor) -> Tensor:
    return parameter.flatten(1).T


def _output_projection(parameter: Tensor) -> Tensor:
    return parameter.flatten(1)


class XLNetAttentionKind(StandInKind):
    """The parameters ``(hidden, heads, head_dim)`` of ``XLNetRelativeAttention``.

    The model multiplies by them with ``einsum``. Each is a layer, named ``rel_attn.q``.
    """

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        if type(module).__name__ != "XLNetRelativeAttention":
            return []
        views = dict.fromkeys(INPUT_PROJECTIONS, _input_projection)
        views[OUTPUT_PROJECTION] = _output_projection
        return [Layer(f"{name}.{key}", module, self, key, view=v) for key, v in views.items()]

    def parameters(
        self, module: nn.Module, layers: Sequence[Layer]
    ) -> Iterator[tuple[WatchedParameter, dict[int, Layer]]]:
        """See `StandInKind`."""
        for layer in layers:
            key = layer.parameter_name
            yield WatchedParameter(module, key, is_transposed=key != OUTPUT_PROJECTION), {0: layer}
