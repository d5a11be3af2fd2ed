"""Merging of adapters (LoRA of peft) into a pruned model, with the zeros kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.find import all_layers
from symprune_lightning.engine.layers.names import (
    has_transformers_adapters,
    is_adapted,
    is_peft_model,
    module_names,
)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """Merge the adapters of a peft model into its weights, except for pruned weights.

    An adapter adds a dense matrix ``Δ`` to a layer's weight. Only its part on kept weights is
    merged, ``W + M ⊙ Δ``; the rest is lost, and how much that is depends on the layer. If it is too
    much, continue training after merging (with ``MaskedFinetuning``).

    Args:
        model: A ``PeftModel`` with adapters that can be merged, such as LoRA.

    Returns:
        The base model with merged weights; and by layer name the fraction of the adapter's change
        that was lost, ``‖(1 − M) ⊙ Δ‖² / ‖Δ‖²``, between 0 and 1.

    Raises:
        TypeError: The model is no ``PeftModel``.
        ValueError: No adapter is on a layer with zeros: use peft's ``merge_and_unload``. Or an
            adapter is of a class that cannot be merged. Nothing has changed then; an error of
            peft's own, such as for weights that are not finite, leaves some adapters merged.
    """
    peft_model: Any = model  # peft is no dependency
    if not callable(getattr(model, "merge_and_unload", None)):
        if not is_peft_model(model):
            advice = (
                "load its adapters by peft, PeftModel.from_pretrained(model, adapters)"
                if has_transformers_adapters(model)
                else "it has no adapters to merge"
            )
            raise TypeError(f"{type(model).__name__} is no PeftModel: {advice}")
        raise ValueError(
            f"the adapter of this {type(model).__name__} changes no weights, as a prompt does not: "
            f"it cannot be merged"
        )
    names = module_names(model)
    adapters = {module: name for module, name in names.items() if is_adapted(module)}
    for module, name in adapters.items():
        if _cannot_merge(module):
            raise ValueError(
                f"the adapter of {name}, a {type(module).__module__}.{type(module).__name__}, "
                f"cannot be merged into a weight: keep it in the PeftModel"
            )
    sparse: dict[Layer, Tensor] = {}
    for layer in all_layers(model):
        mask = layer.matrix() != 0
        if mask.any() and not mask.all():  # a layer of zeros is not pruned, but not trained yet
            sparse[layer] = mask
    inside = {child for module in adapters for child in module.modules()}
    if not any(layer.module in inside for layer in sparse):
        raise ValueError("no adapter is on a layer with zeros: use merge_and_unload of peft")
    lost: dict[str, float] = {}
    for module in adapters:
        lost |= _merge(module, sparse)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        base: nn.Module = peft_model.merge_and_unload(safe_merge=True)
    _mask_replaced(base, sparse)
    return base, lost


def _cannot_merge(adapter: nn.Module) -> bool:
    """Return whether the class of an adapter inherits the ``merge`` that raises."""
    (base,) = [cls for cls in type(adapter).__mro__ if cls.__name__ == "BaseTunerLayer"]
    return getattr(type(adapter), "merge", None) is getattr(base, "merge", None)


def _merge(adapter: Any, sparse: Mapping[Layer, Tensor]) -> dict[str, float]:
    """Merge one adapter, except for pruned weights; return what was lost, by layer."""
    inside = set(adapter.get_base_layer().modules())
    before = {layer: layer.matrix().clone() for layer in sparse if layer.module in inside}
    adapter.merge(safe_merge=True)
    lost: dict[str, float] = {}
    for layer, weight in before.items():
        change = (layer.matrix() - weight).float().square()
        # an adapter of packed experts is of one of their parameters
        if getattr(adapter, "parameter_name", layer.parameter_name) == layer.parameter_name:
            total = float(change.sum().clamp_min(1e-30))
            lost[layer.name] = float(change[~sparse[layer]].sum()) / total
            layer.mask_(sparse[layer])
    return lost


def _mask_replaced(base: nn.Module, sparse: Mapping[Layer, Tensor]) -> None:
    """Zero the pruned weights of layers that peft has replaced by trained copies."""
    replaced = {
        layer.name.replace(".original_module", ""): mask
        for layer, mask in sparse.items()
        if ".original_module" in layer.name
    }
    for layer in all_layers(base):
        if layer.name in replaced:
            layer.mask_(replaced[layer.name])
