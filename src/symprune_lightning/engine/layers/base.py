"""A prunable layer as a matrix view of a parameter, and the base class of layer kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from symprune_lightning.engine.distributed.dtensor import (
    full_tensor,
    is_dtensor,
    local_tensor,
    shard_like,
)
from symprune_lightning.engine.eval_mode import eval_mode
from symprune_lightning.functional.tensors import at_least_float32, row_chunks, zero_


def identity(parameter: Tensor) -> Tensor:
    """Return the parameter itself: the view of a layer that stores ``(out, in)``."""
    return parameter


@dataclass(frozen=True, eq=False)
class Layer:
    """A prunable matrix: a 2-D view of a parameter of some module.

    Only ``view`` knows the storage layout; the rest of the engine works on matrices of shape
    ``(out_features, in_features)``. Layers compare by identity.

    Attributes:
        name: Qualified name, unique in the model.
        module: The module that holds the parameter.
        kind: The kind of layer, which knows how to observe its input.
        parameter_name: Name of the parameter in the module.
        view: Maps the stored parameter, or any tensor of its shape, to a view of shape
            ``(out_features, in_features)`` on the same storage.
        input_key: Distinguishes layers whose matrix inputs differ although their modules are
            called with the same tensor (convolutions with other strides). Two layers share
            statistics only if these are equal.
        is_routed: Whether the layer receives some of a batch's tokens only, in another order.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    parameter_name: str = "weight"
    view: Callable[[Tensor], Tensor] = identity
    input_key: Hashable = None
    is_routed: bool = False

    @property
    def parameter(self) -> Tensor:
        """The parameter as stored."""
        # not getattr first: a stand-in may shadow it, see stand_in.py
        parameter = self.module._parameters.get(self.parameter_name)
        if parameter is None:  # computed, which is refused later
            with eval_mode(self.module):  # a spectral norm changes its buffers otherwise
                parameter = getattr(self.module, self.parameter_name)
        assert isinstance(parameter, Tensor)
        return parameter

    @property
    def is_computed(self) -> bool:
        """Whether a parametrization or a pruning hook computes the weight."""
        return self.module._parameters.get(self.parameter_name) is None

    @property
    def matrix_key(self) -> tuple[int, object]:
        """Identifies the matrix, which layers of several modules may share."""
        return id(self.parameter), self.view

    @property
    def shape(self) -> torch.Size:
        """``(out_features, in_features)``."""
        return self.view(torch.empty(self.parameter.shape, device="meta")).shape

    def matrix(self) -> Tensor:
        """Return the full ``W``, ``(out_features, in_features)``, in float32 at least.

        A view, unless the parameter is a DTensor or in half precision. Gathers DTensors: every rank
        must call this.
        """
        return at_least_float32(self.stored_matrix())

    def stored_matrix(self) -> Tensor:
        """Return the full ``W`` in the dtype of the parameter; see `matrix`."""
        return self.view(full_tensor(self.parameter.detach()))

    def zero_mask(self, mask: Tensor) -> Tensor:
        """Return where the stored parameter is pruned, on this rank's shard.

        Args:
            mask: Bool, ``(out_features, in_features)``, True = kept.

        Returns:
            Bool in the shape of the local parameter, True = pruned. False for entries of the
            parameter outside this layer's view.
        """
        stored = torch.zeros(self.parameter.shape, dtype=torch.bool, device=mask.device)
        self.view(stored).copy_(~mask)
        return shard_like(stored, self.parameter)

    @torch.no_grad()
    def mask_(self, mask: Tensor) -> None:
        """Zero the pruned weights in place.

        Args:
            mask: Bool, ``(out_features, in_features)``, True = kept.
        """
        parameter = self.parameter.detach()
        if is_dtensor(parameter) or not self._is_view(parameter):
            zero_(local_tensor(parameter), self.zero_mask(mask))
        else:
            for weight, kept in zip(
                row_chunks(self.view(parameter)), row_chunks(mask), strict=True
            ):
                zero_(weight, ~kept)

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> None:
        """Replace the weight in place.

        Args:
            weight: ``(out_features, in_features)``, rounded to the parameter's dtype.
        """
        parameter = self.parameter.detach()
        if not is_dtensor(parameter) and self._is_view(parameter):
            self.view(parameter).copy_(weight)
            return
        stored = torch.empty(self.parameter.shape, dtype=weight.dtype, device=weight.device)
        if self.view(stored).numel() < stored.numel():  # other layers share the parameter
            stored.copy_(full_tensor(self.parameter.detach()))
        self.view(stored).copy_(weight)
        local_tensor(self.parameter).copy_(shard_like(stored, self.parameter))

    def _is_view(self, parameter: Tensor) -> bool:
        """Return whether the view shares memory, which flattening in another layout does not."""
        start, size = parameter.data_ptr(), parameter.numel() * parameter.element_size()
        return start <= self.view(parameter).data_ptr() < start + size


Tokens = Callable[[int], Tensor | None]
"""Returns indices of tokens in a batch of that many; ``None`` if the layer's tokens are others.
Called only where they are needed."""


class Visit(Protocol):
    """Observes the input of a layer before it is used, or a gradient of its output."""

    def __call__(self, layer: Layer, x: Tensor, tokens: Tokens | None = None, /) -> None:
        """Observe.

        Args:
            layer: The layer.
            x: Its input ``(..., tokens, in_features)``, or the gradient of its output.
            tokens: Returns the index of each row's token in the flattened batch, for layers that
                receive some of the tokens. ``None`` if the layer receives all of them, or if it
                is not known which.
        """


class LayerKind(ABC):
    """Base class of kinds of layers: how their matrices are found and their inputs observed.

    A new kind is one subclass in one file of ``engine/layers/kinds``, or in your own package.
    """

    @abstractmethod
    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """Return the prunable matrices of a module.

        Args:
            name: Qualified name of the module.
            module: Any module of the model. A layer may be in a child that the module uses without
                calling it; it then replaces the layer that another kind finds in the child.

        Returns:
            The layers, in the order in which the module uses them; empty if the module is not of
            this kind.
        """

    @abstractmethod
    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """Call ``visit(layer, x)`` before each use of a layer of this module.

        Args:
            module: The module.
            layers: Its layers, as ``layers`` returned them.
            visit: The callback. It may suspend the forward, prune the layer, or raise.

        Returns:
            A context manager; the module is as before when it exits.
        """

    def watch_gradients(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """Call ``visit(layer, gradient)`` in the backward pass, for each use of a layer.

        This implementation is for modules with one layer, whose output is that of the matrix.

        Args:
            module: The module.
            layers: Its layers.
            visit: Called with the gradient of the loss with respect to the matrix's output,
                ``(..., tokens, out_features)``.
        """
        return watch_output_gradient(module, layers[0], visit)

    def measure_all_tokens(
        self, module: nn.Module, is_needed: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """Visit the layers of a module with all tokens, for modules that route tokens to layers.

        This implementation does nothing: the module's layers receive all tokens.

        Args:
            module: The module.
            is_needed: Called before each call of the module; returns whether a layer is measured.
        """
        return nullcontext()


def follow_gradient(output: Tensor, visit: Callable[[Tensor], None]) -> Tensor:
    """Return ``output``, and call ``visit`` with its gradient in the backward pass."""
    if not output.requires_grad:
        # No parameter requires a gradient while sensitivities are measured, so the graph begins
        # here, at the first layers. A clone, since a leaf may not be modified in place.
        output = output.detach().requires_grad_().clone()
    output.register_hook(visit)  # type: ignore[no-untyped-call]
    return output


@contextmanager
def watch_output_gradient(module: nn.Module, layer: Layer, visit: Visit) -> Iterator[None]:
    """Visit a layer with the gradient of its module's output."""

    def hook(_: nn.Module, args: object, output: Tensor) -> Tensor:
        return follow_gradient(output, lambda gradient: visit(layer, gradient))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watch_first_argument(
    module: nn.Module, layers: Sequence[Layer], visit: Visit
) -> Iterator[None]:
    """Visit layers whose matrix input is the first argument of the module's forward."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        for layer in layers:
            visit(layer, x)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def group_by_module(layers: Iterable[Layer]) -> dict[nn.Module, list[Layer]]:
    """Return the layers of each module, in order."""
    by_module: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        by_module.setdefault(layer.module, []).append(layer)
    return by_module


def distinct_parameters(layers: Iterable[Layer]) -> list[Tensor]:
    """Return the parameters of layers; one that holds several of them once."""
    return list({id(layer.parameter): layer.parameter for layer in layers}.values())


@contextmanager
def watch_layers(
    layers: Iterable[Layer], visit: Visit, visit_gradient: Visit | None = None
) -> Iterator[None]:
    """Watch the inputs of all given layers, and the gradients of their outputs if requested."""
    with ExitStack() as stack:
        for module, members in group_by_module(layers).items():
            kind = members[0].kind
            stack.enter_context(kind.watch(module, members, visit))
            if visit_gradient is not None:
                stack.enter_context(kind.watch_gradients(module, members, visit_gradient))
        yield
