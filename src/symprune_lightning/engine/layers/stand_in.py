"""Observation of weights that are used without a call of a module of their own.

A hook observes calls of a module. The matrices of packed experts, and weights that another module
reads, have no such calls. While a run lasts, a *stand-in* shadows their parameter in the instance
dictionary of its module; ``_parameters``, and so the state dict and every optimizer, keep the
tensor. The model's own code uses the stand-in in place of the tensor. Where it multiplies by it,
the layers concerned are visited, and then the same function runs with the tensor itself: no forward
is copied, and results are those of the model, bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from symprune_lightning.engine.layers.base import Layer, follow_gradient, identity
from symprune_lightning.engine.layers.products import Operand, Use, attention, call, find_uses


class Listener(Protocol):
    """Called with a layer, its input, and the rows of a grouped product that the input is."""

    def __call__(self, layer: Layer, x: Tensor, rows: slice | None, /) -> None:
        """Observe a use, before it, or a gradient of its output."""


@dataclass(frozen=True)
class Watcher:
    """A layer and the callbacks that observe its uses."""

    layer: Layer
    on_input: Listener | None
    on_gradient: Listener | None


class WatchedParameter:
    """The parameter behind a stand-in, and the callbacks that observe its uses.

    Args:
        module: The module that holds it.
        name: Its name there.
        is_transposed: Whether its matrices are stored as ``(in, out)`` and not ``(out, in)``.
        is_stacked: Whether it is a stack of matrices, one per layer, and not a single one.
        only: Returns the matrix whose use is observed at the moment; ``None`` for all.

    Attributes:
        watchers: Index of a matrix to the watchers of its layer.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        is_transposed: bool = False,
        is_stacked: bool = False,
        only: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.module, self.name = module, name
        self.is_transposed, self.is_stacked, self.only = is_transposed, is_stacked, only
        self.watchers: defaultdict[int, list[Watcher]] = defaultdict(list)

    @property
    def tensor(self) -> Tensor:
        """The tensor at this moment: placements replace it."""
        tensor = self.module._parameters[self.name]
        assert tensor is not None
        return tensor

    @property
    def needs_gradients(self) -> bool:
        """True if a callback observes gradients."""
        return any(w.on_gradient is not None for group in self.watchers.values() for w in group)

    def visit(self, use: Use) -> None:
        """Notify the watchers of a matrix of its input."""
        for watcher in tuple(self.watchers.get(use.index, ())):
            if watcher.on_input is not None:
                watcher.on_input(watcher.layer, use.x, use.rows)

    def visit_gradient(self, use: Use, gradient: Tensor) -> None:
        """Notify the watchers of a matrix of the gradient of its output."""
        for watcher in tuple(self.watchers.get(use.index, ())):
            if watcher.on_gradient is not None:
                watcher.on_gradient(watcher.layer, use.output(gradient), use.rows)


class StandIn(Operand):
    """Takes the place of a parameter, or of a view of one, in the model's own code.

    Args:
        parameter: The parameter.
        index: The matrix of a stack; ``None`` for all of them, or for a single matrix.
        function: Maps the parameter to the tensor that this object stands for.
        is_flipped: Whether the last two dimensions are exchanged.
    """

    def __init__(
        self,
        parameter: WatchedParameter,
        function: Callable[[Tensor], Tensor],
        *,
        index: int | None = None,
        is_flipped: bool = False,
    ) -> None:
        self.parameter, self.function = parameter, function
        self.index, self.is_flipped = index, is_flipped

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``nn.Parameter``, for models that test with ``isinstance``."""
        return nn.Parameter

    @property
    def tensor(self) -> Tensor:
        """See `Operand`."""
        return self.function(self.parameter.tensor)

    @property
    def is_matrix(self) -> bool:
        """See `Operand`."""
        return self.index is not None or not self.parameter.is_stacked

    @property
    def is_input_first(self) -> bool:
        """See `Operand`."""
        return self.parameter.is_transposed != self.is_flipped

    @property
    def only(self) -> int | None:
        """See `Operand`."""
        return self.parameter.only()

    def visit(self, use: Use) -> None:
        """See `Operand`."""
        self.parameter.visit(use)

    def __getattr__(self, name: str) -> Any:
        tensor = self.tensor
        value = getattr(tensor, name)
        if not callable(value):
            return value

        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is tensor else result  # such as .to() of the same dtype

        return method

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, key: Any) -> Any:
        is_scalar = isinstance(key, Tensor) and key.dim() == 0 and key.dtype is not torch.bool
        if self.is_matrix or not (isinstance(key, int) or is_scalar):
            return self.tensor[key]
        index = int(key)
        return self._derived(lambda stack: stack[index], index=index)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Exchange the dimensions of the matrices; any others give a plain tensor."""
        ndim = 2 if self.is_matrix else 3
        if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
            return self.tensor.transpose(dim0, dim1)
        return self._derived(lambda x: x.transpose(-2, -1), is_flipped=not self.is_flipped)

    @property
    def mT(self) -> Any:  # noqa: N802
        """Exchange the dimensions of the matrices."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802
        """Exchange the dimensions of a matrix."""
        return self.transpose(-2, -1) if self.is_matrix else self.tensor.T

    def t(self) -> Any:
        """Exchange the dimensions of a matrix."""
        return self.T

    def view(self, *shape: Any) -> Any:
        """View a stack of matrices along the rows in three dimensions; others are plain tensors."""
        viewed = self.tensor.view(*shape)
        if self.is_matrix or viewed.dim() != 3 or self.is_flipped:
            return viewed
        size = viewed.shape
        return self._derived(lambda x: x.view(size))

    def __matmul__(self, other: Tensor) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def _derived(
        self,
        view: Callable[[Tensor], Tensor],
        *,
        index: int | None = None,
        is_flipped: bool | None = None,
    ) -> StandIn:
        outer = self.function
        return StandIn(
            self.parameter,
            lambda tensor: view(outer(tensor)),
            index=self.index if index is None else index,
            is_flipped=self.is_flipped if is_flipped is None else is_flipped,
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            return attention(func, args, kwargs)
        uses = find_uses(name, args, kwargs)
        given = [*args, *kwargs.values()]
        parameter = next((a.parameter for a in given if isinstance(a, StandIn)), None)
        if parameter is not None:
            for use in uses:
                parameter.visit(use)
        # the tensors are taken only now: a visit may prune the layer, or suspend the batch while
        # a placement replaces the parameter
        args, kwargs = tree_map(_tensor, args), tree_map(_tensor, kwargs)
        output = call(func, name, args, kwargs)
        if parameter is not None and uses and parameter.needs_gradients:

            def visit(gradient: Tensor) -> None:
                for use in uses:
                    parameter.visit_gradient(use, gradient)

            output = follow_gradient(output, visit)
        return output


def _delegate(name: str) -> Callable[..., Any]:
    """Return a method that calls an operator of the tensor; such a use is not observed."""

    def operator(self: StandIn, *args: Any) -> Any:
        return getattr(self.tensor, name)(*map(_tensor, args))

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg"):
    setattr(StandIn, f"__{_name}__", _delegate(f"__{_name}__"))


def _tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, StandIn) else value


@contextmanager
def watch_uses(
    parameter: WatchedParameter,
    layers: Mapping[int, Layer],
    on_input: Listener | None = None,
    on_gradient: Listener | None = None,
) -> Iterator[None]:
    """Call listeners for each use of layers inside the context.

    Contexts of one parameter can be nested: they share a stand-in.

    Args:
        parameter: The parameter.
        layers: Index of a matrix in it to the layer.
        on_input: Called before a use.
        on_gradient: Called in the backward pass.
    """
    attributes, name = parameter.module.__dict__, parameter.name
    is_first = name not in attributes
    if is_first:
        attributes[name] = StandIn(parameter, identity)
    watchers = attributes[name].parameter.watchers
    added = {index: Watcher(layer, on_input, on_gradient) for index, layer in layers.items()}
    for index, watcher in added.items():
        watchers[index].append(watcher)
    try:
        yield
    finally:
        for index, watcher in added.items():
            watchers[index].remove(watcher)
        if is_first:
            del attributes[name]
