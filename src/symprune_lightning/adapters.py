"""Adapters (LoRA of peft) that were trained on a pruned model, merged so that zeros stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from symprune_lightning.engine.layers import is_linear


@torch.no_grad()
def merge_adapters(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """Merge the adapters of a peft model into its weights, but for weights that are pruned.

    An adapter adds a dense matrix ``Δ`` to a layer's weight. Only its part on kept weights is
    merged, ``W + M ⊙ Δ``; the other is lost, and how much that is depends on the layer. Train on
    after merging (with ``MaskedFinetuning``) if it is too much.

    Args:
        model: A ``PeftModel`` with adapters that can be merged, such as LoRA.

    Returns:
        The base model with merged weights, and by layer name the share of the adapter's change
        that was lost, ``‖(1 − M) ⊙ Δ‖² / ‖Δ‖²``, between 0 and 1.

    Raises:
        TypeError: It is no model of peft.
        ValueError: No adapter is on a layer with zeros: use peft's ``merge_and_unload``.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"{type(model).__name__} is no model of peft: it has no adapters to merge")
    lost: dict[str, float] = {}
    for name, module in model.named_modules():
        layer: Any = getattr(module, "base_layer", None)
        if layer is None or not is_linear(layer):
            continue
        before = layer.weight.clone()
        module.merge(safe_merge=True)
        pruned = before == 0
        if pruned.any():
            change = (layer.weight - before).float().square()
            lost[name] = float(change[pruned].sum() / change.sum().clamp_min(1e-30))
            layer.weight.masked_fill_(pruned, 0)
    if not lost:
        raise ValueError("no adapter is on a layer with zeros: use merge_and_unload of peft")
    base: nn.Module = model.unload()  # type: ignore[operator]
    prefix = "base_model.model."
    return base, {name.removeprefix(prefix): share for name, share in lost.items()}
