"""Base class of kinds of layers that are observed by stand-ins only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

from symprune_lightning.engine.layers.base import Layer, LayerKind, Visit
from symprune_lightning.engine.layers.stand_in import Listener, WatchedParameter, watch_uses


class StandInKind(LayerKind):
    """Base class of kinds whose layers are observed by stand-ins and receive all tokens."""

    @abstractmethod
    def parameters(
        self, module: nn.Module, layers: Sequence[Layer]
    ) -> Iterator[tuple[WatchedParameter, dict[int, Layer]]]:
        """Yield the parameters of layers, with the layers by the index of their matrix."""

    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return self._watch(module, layers, lambda layer, x, _: visit(layer, x), None)

    def watch_gradients(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return self._watch(module, layers, None, lambda layer, x, _: visit(layer, x))

    @contextmanager
    def _watch(
        self,
        module: nn.Module,
        layers: Sequence[Layer],
        on_input: Listener | None,
        on_gradient: Listener | None,
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for parameter, members in self.parameters(module, layers):
                stack.enter_context(watch_uses(parameter, members, on_input, on_gradient))
            yield
