"""Merging of adapters (LoRA of peft) into a pruned model, with the zeros kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from symprune_lightning.engine.layers.find import all_layers


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
        ValueError: No adapter is on a layer with zeros: use peft's ``merge_and_unload``.
    """
    # by its method, since peft is no dependency
    if not callable(getattr(model, "merge_and_unload", None)):
        raise TypeError(f"{type(model).__name__} is no PeftModel: it has no adapters to merge")
    suffix = ".base_layer"
    bases = {
        layer.name.removesuffix(suffix): layer
        for layer in all_layers(model)
        if layer.name.endswith(suffix)
    }
    lost: dict[str, float] = {}
    for name, layer in bases.items():
        adapter: Any = model.get_submodule(name)
        before = layer.parameter.clone()
        adapter.merge(safe_merge=True)
        pruned = before == 0
        if pruned.any():
            change = (layer.parameter - before).float().square()
            lost[name] = float(change[pruned].sum() / change.sum().clamp_min(1e-30))
            layer.parameter.masked_fill_(pruned, 0)
    if not lost:
        raise ValueError("no adapter is on a layer with zeros: use merge_and_unload of peft")
    base: nn.Module = model.unload()  # type: ignore[operator]
    prefix = "base_model.model."
    return base, {name.removeprefix(prefix): fraction for name, fraction in lost.items()}
