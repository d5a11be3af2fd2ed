"""The layers of a model, and the layers that names resolve to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

import symprune_lightning.engine.layers.kinds  # noqa: F401 — registers the kinds of layers
from symprune_lightning.engine.layers.base import Layer, LayerKind
from symprune_lightning.engine.layers.names import module_names
from symprune_lightning.functional.registry import leaves


def all_layers(model: nn.Module) -> list[Layer]:
    """Return every layer of a known kind, in the order in which the model registers them.

    Names are those in the plain model, see ``module_names``.
    """
    kinds = [kind() for kind in leaves(LayerKind)]  # type: ignore[type-abstract]
    names = module_names(model)
    position = {module: i for i, module in enumerate(names)}
    found: dict[str, Layer] = {}
    for module, name in names.items():
        for kind in kinds:
            for layer in kind.layers(name, module):
                # a parent that uses the weight of a child itself comes first
                found.setdefault(layer.name, layer)
    return sorted(found.values(), key=lambda layer: position[layer.module])


def find_layers(model: nn.Module, names: Iterable[str]) -> list[Layer]:
    """Resolve names to layers.

    Raises:
        KeyError: The model has no layer of that name; the exception's argument is the name.
    """
    by_name = {layer.name: layer for layer in all_layers(model)}
    return [by_name[name] for name in names]
