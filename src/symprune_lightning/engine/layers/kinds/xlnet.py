"""The attention projections of XLNet, which are parameters in three dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer, LayerKind, Visit
from symprune_lightning.engine.layers.stand_in import Listener, WatchedParameter, watch_uses

INPUT_PROJECTIONS = ("q", "k", "v", "r")
OUTPUT_PROJECTION = "o"


def _input_projection(parameter: Tensor) -> Tensor:
    return parameter.flatten(1).T


def _output_projection(parameter: Tensor) -> Tensor:
    return parameter.flatten(1)


class XLNetAttentionKind(LayerKind):
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

    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return _watch(module, layers, lambda layer, x, _: visit(layer, x), None)

    def watch_gradients(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return _watch(module, layers, None, lambda layer, x, _: visit(layer, x))


@contextmanager
def _watch(
    module: nn.Module,
    layers: Sequence[Layer],
    on_input: Listener | None,
    on_gradient: Listener | None,
) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            key = layer.parameter_name
            parameter = WatchedParameter(module, key, is_transposed=key != OUTPUT_PROJECTION)
            stack.enter_context(watch_uses(parameter, {0: layer}, on_input, on_gradient))
        yield
