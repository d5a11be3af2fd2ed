"""Which layers can be pruned, in which order, and how to read and write their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from symprune_lightning.engine.parallel import gathered, local, local_part
from symprune_lightning.functional.statistics import at_least_float32

T = TypeVar("T")

LM_HEAD = (r"re:.*lm_head(\..*)?",)
"""The layers spared by default: the output projection, often tied to the embeddings."""

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layer:
    """One prunable layer: a ``Linear``, or a ``Conv1D`` of transformers (weight transposed).

    Attributes:
        name: Its qualified name in the model.
        module: The layer itself.
    """

    name: str
    module: nn.Module

    @property
    def parameter(self) -> Tensor:
        """The weight as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the module stores ``(in_features, out_features)``."""
        return not isinstance(self.module, nn.Linear)

    @property
    def shape(self) -> torch.Size:
        """``(out_features, in_features)``."""
        shape = self.parameter.shape
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        """``W``, shape ``(out_features, in_features)``, float32 at least."""
        weight = gathered(self.parameter.detach())
        return at_least_float32(weight.T if self.transposed else weight)

    def pruned(self, mask: Tensor) -> Tensor:
        """Where this process's part of the weight, as the module stores it, is pruned.

        Args:
            mask: Bool, ``(out_features, in_features)``, True = kept.
        """
        return ~local_part(mask.T if self.transposed else mask, self.parameter)

    @torch.no_grad()
    def apply_(self, mask: Tensor) -> None:
        """Zero the weights that are not kept.

        Args:
            mask: Bool, ``(out_features, in_features)``, True = kept.
        """
        local(self.parameter).masked_fill_(self.pruned(mask), 0)

    @torch.no_grad()
    def write_(self, weight: Tensor) -> None:
        """Replace the weight.

        Args:
            weight: ``(out_features, in_features)``, rounded to the module's dtype.
        """
        values = weight.T if self.transposed else weight
        local(self.parameter).copy_(local_part(values, self.parameter))


def prunable_layers(
    model: nn.Module,
    ignore: Sequence[str] = LM_HEAD,
    only: Sequence[str] | None = None,
    *,
    on_meta: bool = False,
) -> list[Layer]:
    """All layers that are to be pruned, in the order in which the model registers them.

    A weight shared with a module that is no such layer (an output projection tied to the
    embeddings) is never pruned; one shared by several layers is listed once.

    Args:
        model: Any module.
        ignore: Layers to leave alone: qualified names, or regular expressions for the whole name
            behind ``re:``.
        only: Layers to prune, in the same way; ``None`` for all.
        on_meta: Whether weights may be on the meta device, to be loaded later.

    Raises:
        ValueError: Nothing is left to prune, an entry matches no layer, or a layer is quantised or
            has no storage.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> [layer.name for layer in prunable_layers(model, ignore=["re:2"])]
        ['0']
    """
    found = linear_layers(model)
    names = [layer.name for layer in found]
    ignored = {
        name
        for entry in ignore
        # a model without an output projection is no mistake, so the default may match nothing
        for name in matching(entry, names, required=entry not in LM_HEAD)
    }
    if only is not None:
        ignored |= set(names) - {name for entry in only for name in matching(entry, names)}
    taken = {id(p) for m in model.modules() if not is_linear(m) for p in m.parameters(False)}
    layers = []
    for layer in found:
        if layer.name not in ignored and id(layer.parameter) not in taken:
            taken.add(id(layer.parameter))
            _check_weight(layer, on_meta=on_meta)
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has {len(found)} Linear or Conv1D layers, "
            f"and all are ignored ({', '.join(ignore) or 'none'}) or tied to other modules"
        )
    return layers


def linear_layers(model: nn.Module) -> list[Layer]:
    """All linear layers, whether they are to be pruned or not."""
    return [Layer(name, m) for name, m in model.named_modules() if is_linear(m)]


def spared_modules(model: nn.Module, layers: Iterable[Layer]) -> list[nn.Module]:
    """The linear modules that are no layers to prune, such as the output projection."""
    pruned = {layer.module for layer in layers}
    return [m for m in model.modules() if is_linear(m) and m not in pruned]


def decoder_blocks(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """The repeated blocks of a model: entries of its outermost lists that hold prunable layers.

    Found by structure, not by name: a block is a child of a ``ModuleList`` or ``Sequential`` that
    has prunable layers inside and is not itself inside another block.
    """
    prunable = {layer.module for layer in layers}

    def search(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            inside = child not in prunable and not prunable.isdisjoint(child.modules())
            if inside and isinstance(module, nn.ModuleList | nn.Sequential):
                yield child
            elif inside:
                yield from search(child)

    return search(model)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a ``Linear`` or a ``Conv1D`` of transformers."""
    # the latter is recognised by its name, so that the engine need not import transformers
    return isinstance(module, nn.Linear) or any(
        (c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for c in type(module).__mro__
    )


def by_layer(settings: Mapping[str, T], layers: Sequence[Layer]) -> dict[str, T]:
    """Spread settings given by layer name over the layers; the first entry that matches counts.

    Args:
        settings: Names, or regular expressions behind ``re:``, to settings.
        layers: The layers to be pruned.

    Returns:
        Layer name to setting, only for layers that an entry matches.

    Raises:
        ValueError: An entry matches no layer or is no regular expression.
    """
    spread: dict[str, T] = {}
    for pattern, setting in settings.items():
        for name in matching(pattern, [layer.name for layer in layers]):
            spread.setdefault(name, setting)
    return spread


def matching(pattern: str, names: Sequence[str], *, required: bool = True) -> list[str]:
    """The names that equal ``pattern``, or match it wholly if it begins with ``re:``.

    Raises:
        ValueError: It is no regular expression, or there are none although ``required``.

    Examples:
        >>> matching("re:.*q_proj", ["layers.0.q_proj", "layers.0.k_proj"])
        ['layers.0.q_proj']
    """
    regex = pattern[3:] if pattern.startswith("re:") else re.escape(pattern)
    try:
        hits = [name for name in names if re.fullmatch(regex, name)]
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if required and not hits:
        raise ValueError(
            f"{pattern!r} matches none of the {len(names)} layers, which are: "
            f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        )
    return hits


def _check_weight(layer: Layer, *, on_meta: bool) -> None:
    if layer.module._parameters.get("weight") is None:
        raise ValueError(
            f"layer {layer.name} computes its weight (a parametrization, or torch.nn.utils.prune): "
            f"zeros would not stay in it; make the weight a plain parameter first"
        )
    weight = layer.parameter
    if weight.dtype not in FLOATING or weight.dim() != 2:
        raise ValueError(
            f"layer {layer.name} holds {weight.dtype} of shape {tuple(weight.shape)}: it is "
            f"quantised; prune the model before quantising it"
        )
    if weight.device.type == "mps":
        raise ValueError(
            f"layer {layer.name} is on Apple's MPS, which has no float64 to sum statistics in: "
            f"move the model to the CPU, or use Trainer(accelerator='cpu')"
        )
    if weight.is_meta and not on_meta:
        raise ValueError(f"layer {layer.name} is on the meta device; load its weights first")
