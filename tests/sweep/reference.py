"""Wanda's masks by another way than the library's: by the storage of the operands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from symprune_lightning.engine.layers.base import Layer


class InputNorms(TorchFunctionMode):
    """Sums the squared inputs of layers in every product with their weight.

    A weight is recognised by its storage and its offset, whatever view the model makes of it.

    Attributes:
        squares: Layer name to the sum over tokens of the squared inputs, ``(in_features,)``.
        tokens: Layer name to the number of tokens.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.squares: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._layers: dict[tuple[int, int], Layer] = {}
        for layer in layers:
            view = layer.view(layer.parameter.detach())
            self._layers[view.untyped_storage().data_ptr(), view.storage_offset()] = layer

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear":
            self._add(args[1] if len(args) > 1 else kwargs["weight"], args[0])
        elif name in ("matmul", "__matmul__", "mm"):
            self._add(args[1], args[0])
            if isinstance(args[1], Tensor):
                self._add(args[0], args[1].mT)
        elif name == "addmm":
            self._add(args[2], args[1])
        elif name == "bmm":
            for x, weight in zip(args[0], args[1], strict=True):
                self._add(weight, x)
        elif name == "einsum" and len(args) == 3:
            self._add(args[2], args[1])
        return func(*args, **kwargs)

    def _add(self, weight: Any, x: Tensor) -> None:
        if not isinstance(weight, Tensor) or weight.is_meta:
            return
        key = (weight.untyped_storage().data_ptr(), weight.storage_offset())
        layer = self._layers.get(key)
        if layer is None or layer.shape.numel() != weight.numel():
            return
        tokens = x.detach().double().reshape(-1, layer.shape[1])
        if type(layer.module).__name__ == "Llama4TextExperts":
            tokens = tokens[tokens.any(-1)]  # not routed to this expert
        self.squares[layer.name] = self.squares.get(layer.name, 0) + tokens.square().sum(0)
        self.tokens[layer.name] = self.tokens.get(layer.name, 0) + len(tokens)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Run experts one by one and without caches."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with ExitStack() as stack:
        for config in configs.values():
            for name, value in (("_experts_implementation", "eager"), ("use_cache", False)):
                if hasattr(config, name):
                    stack.callback(setattr, config, name, getattr(config, name))
                    setattr(config, name, value)
        yield


def input_norms(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], layers: Iterable[Layer]
) -> InputNorms:
    """Run a model and return the inputs of its layers."""
    norms = InputNorms(layers)
    with torch.no_grad(), plain(model), norms:
        for batch in batches:
            model(**batch)
    return norms


def wanda_mask(weight: Tensor, squares: Tensor, tokens: int) -> Tensor:
    """Return the mask that prunes half of each row by ``|W| ‖x‖``, ties by position."""
    score = weight.float().abs() * (squares / max(tokens, 1)).sqrt().float()
    order = score.argsort(dim=1, stable=True)
    mask = torch.ones_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, : weight.shape[1] // 2], value=False)
