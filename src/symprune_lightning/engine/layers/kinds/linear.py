"""``torch.nn.Linear``."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor, nn

from symprune_lightning.engine.distributed.dtensor import is_dtensor
from symprune_lightning.engine.layers.base import (
    Layer,
    LayerKind,
    Tokens,
    Visit,
    watch_first_argument,
)
from symprune_lightning.engine.layers.kinds.stacked import num_groups
from symprune_lightning.engine.layers.stand_in import WatchedParameter
from symprune_lightning.engine.layers.stand_in_kind import StandInKind


class LinearKind(LayerKind):
    """``nn.Linear`` and its subclasses: the weight is stored as ``(out_features, in_features)``."""

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        is_linear = isinstance(module, nn.Linear) and num_groups(module) == 1
        return [Layer(name, module, self)] if is_linear else []

    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""

        def visit_checked(layer: Layer, x: Tensor, tokens: Tokens | None = None) -> None:
            _check_input(layer, x)
            visit(layer, x, tokens)

        # a forward of its own may convert its input
        is_patched = "forward" in vars(module)
        has_own = is_patched or type(module).forward is not nn.Linear.forward
        return watch_first_argument(module, layers, visit if has_own else visit_checked)


def _check_input(layer: Layer, x: Tensor) -> None:
    """Refuse an input that the layer cannot be called with, before the layer is pruned."""
    weight = layer.parameter
    if is_dtensor(weight):
        return
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the input of layer {layer.name} has {x.shape[-1]} features, and its weight "
            f"{weight.shape[1]}: the batches do not fit the model"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"the input of layer {layer.name} is {x.dtype}, and its weight {weight.dtype}: convert "
            f"the batches, or the model"
        )


class ReadLinearKind(StandInKind):
    """``nn.Linear`` whose weight its parent multiplies by, instead of calling it.

    Such as ``dt_proj`` of Mamba, and the output projection of ``nn.MultiheadAttention``. Whether
    the parent reads the weight is found in its source.
    """

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        prefix = f"{name}." if name else ""
        return [
            Layer(prefix + key, child, self)
            for key, child in module.named_children()
            if isinstance(child, nn.Linear) and reads_weight(module, key)
        ]

    def parameters(
        self, module: nn.Module, layers: Sequence[Layer]
    ) -> Iterator[tuple[WatchedParameter, dict[int, Layer]]]:
        """See `StandInKind`."""
        yield WatchedParameter(module, layers[0].parameter_name), {0: layers[0]}


def reads_weight(module: nn.Module, child: str) -> bool:
    """Return whether the code of a module reads the weight of one of its children."""
    classes = (cls for cls in type(module).__mro__ if cls not in (nn.Module, object))
    return any(child in _read_children(cls) for cls in classes)


_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.\w)")


@cache
def _read_children(cls: type) -> frozenset[str]:
    """Return the names of children whose weights the code of a class reads."""
    try:
        if not _is_read_in(cls.__module__):
            return frozenset()
        return frozenset(_READ.findall(inspect.getsource(cls)))
    except (OSError, TypeError):  # built in, or defined interactively
        return frozenset()


@cache
def _is_read_in(module: str) -> bool:
    """Return whether any class of a module may read such a weight.

    For most modules none does, and `inspect.getsource` parses the whole file for each class.
    """
    source = sys.modules.get(module)
    file = None if source is None else inspect.getsourcefile(source)
    if source is None or file is None:
        return True
    linecache.checkcache(file)
    return _READ.search("".join(linecache.getlines(file, vars(source)))) is not None
