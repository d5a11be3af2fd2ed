"""Layers that are not pruned unless they are named: heads, routers, adapters, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from symprune_lightning.engine.layers.base import Layer, group_by_module
from symprune_lightning.engine.layers.names import is_adapted, is_replaced

OUTPUT_PROJECTION = "output projection"
ROUTER = "router"
ADAPTER = "adapter"
PATCH_EMBEDDING = "patch embedding"
HEAD = "head"
MAX_IMAGE_CHANNELS = 4
"""Input channels of images; convolutions between feature maps have more."""


def exempt_layers(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Return the layers that are not pruned by default, with the reason.

    - Output projections: what ``get_output_embeddings`` returns, and layers named ``lm_head``.
      Often tied to the embeddings, and sensitive.
    - Heads: linear layers of a model of transformers that are outside its base model, such as
      ``classifier``, and what ``get_classifier`` of a model of timm returns. They are small, and
      every prediction depends on each of their rows.
    - Routers: the gate of a mixture of experts, and the gate of its shared expert. They are small,
      and errors change which experts receive a token.
    - Adapters of peft: they are trained, and begin with zeros.
    - Patch embeddings: convolutions that cut an image or a signal into patches without overlap.
      They embed images, as token embeddings embed tokens.

    Args:
        model: The model.
        layers: All its layers.

    Returns:
        Layer name to ``"output projection"``, ``"head"``, ``"router"``, ``"adapter"`` or ``"patch
        embedding"``.
    """
    modules: dict[nn.Module, str] = {}
    for finder, reason in (
        (_heads, HEAD),
        (_output_projections, OUTPUT_PROJECTION),
        (_routers, ROUTER),
        (_adapters, ADAPTER),
        (_patch_embeddings, PATCH_EMBEDDING),
    ):
        modules |= dict.fromkeys(finder(model, layers), reason)
    exempt = {layer.name: modules[layer.module] for layer in layers if layer.module in modules}
    for layer in layers:
        if re.fullmatch(r"(.*\.)?lm_heads?(\..*)?", layer.name):
            exempt.setdefault(layer.name, OUTPUT_PROJECTION)
    return exempt


def _heads(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """Yield the modules of heads; those of transformers and timm tell them from the rest."""
    for module in model.modules():
        base = getattr(module, str(getattr(module, "base_model_prefix", "")) or "-", None)
        if isinstance(base, nn.Module) and base is not module:
            for child in module.children():
                parts = [part for part in child.modules() if part is not base]
                # a tower next to the base model has blocks; a head has none
                is_head = not any(isinstance(part, nn.ModuleList) for part in parts)
                if child is not base and is_head:
                    yield from (part for part in parts if isinstance(part, nn.Linear))
        classifier = getattr(module, "get_classifier", None)
        if callable(classifier):
            try:
                heads = classifier()
            # a method of another meaning, with arguments; or of a base class
            except (TypeError, AttributeError, NotImplementedError):
                continue
            for head in heads if isinstance(heads, tuple) else (heads,):
                if isinstance(head, nn.Module):
                    yield from head.modules()


def _output_projections(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):  # a model without one
                continue
            if isinstance(head, nn.Module):
                yield from head.modules()


def _adapters(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    for module in model.modules():
        if is_adapted(module):
            base = getattr(module, "base_layer", None)
            kept = set() if base is None else set(base.modules())
            yield from (child for child in module.modules() if child not in kept)
        if is_replaced(module):  # the model calls the copy
            yield from module.original_module.modules()  # type: ignore[union-attr]


def _patch_embeddings(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    for layer in layers:
        module = layer.module
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            is_patch = module.kernel_size == module.stride and max(module.kernel_size) > 1
            if is_patch and module.in_channels <= MAX_IMAGE_CHANNELS:
                yield module


def _routers(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """Yield the modules with layers that route tokens, found by structure.

    A router is next to experts, or next to the module that holds them, and has one output for each
    of them.
    """
    by_module = group_by_module(layers)
    parents = {child: module for module in model.modules() for child in module.children()}
    for experts, count in _experts(model, by_module):
        inner = experts
        for is_next_to_experts in (True, False):
            parent = parents.get(inner)
            # the children of a container are alike, and no parts of one module
            if parent is None or isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                break
            for sibling in parent.children():
                # further up, a layer with as many outputs may be the head of the model
                if sibling is not inner and (is_next_to_experts or is_router_class(sibling)):
                    yield from _routers_in(sibling, count, by_module)
            inner = parent


def is_router_class(module: nn.Module) -> bool:
    """Return whether the name of a module's class says that it routes tokens."""
    return re.search("router|gating", type(module).__name__, re.IGNORECASE) is not None


def _experts(
    model: nn.Module, by_module: Mapping[nn.Module, Sequence[Layer]]
) -> Iterator[tuple[nn.Module, int]]:
    """Yield modules that hold experts, and their number."""
    for module, members in by_module.items():
        if members[0].is_routed:
            yield module, sum(x.parameter_name == members[0].parameter_name for x in members)
    for name, module in model.named_modules():
        is_container = isinstance(module, nn.ModuleList | nn.ModuleDict)
        # by name: lists of blocks look alike
        is_named = "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if is_container and is_named and len(module) > 1:
            yield module, len(module)


def _routers_in(
    sibling: nn.Module,
    count: int,
    by_module: Mapping[nn.Module, Sequence[Layer]],
) -> Iterator[nn.Module]:
    """Yield the modules of a sibling of experts that hold a router's layers."""
    inside = [module for module in sibling.modules() if module in by_module]
    members = [layer for module in inside for layer in by_module[module]]
    if any(layer.is_routed for layer in members):
        return  # it has experts of its own, and their router
    shapes = [layer.shape for layer in members]
    if sibling in by_module and len(shapes) == 1 and shapes[0][0] == 1:
        yield sibling  # the gate of a shared expert
    if is_router_class(sibling):
        yield from inside
    elif shapes and shapes[-1][0] == count != shapes[0][1]:
        # attention and shared experts return to the width of their input; routers do not
        yield from inside
