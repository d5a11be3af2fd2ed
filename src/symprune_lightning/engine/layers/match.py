"""Layers that masks belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.find import find_layers
from symprune_lightning.functional.packing import PackedMasks


def match_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Layer]:
    """Return the layers that masks belong to, in the order of the masks.

    Raises:
        ValueError: The model has no such layer, or one of another shape, or a mask is not bool.
    """
    try:
        layers = find_layers(model, masks)
    except KeyError as error:
        name, kind = error.args[0], type(model).__name__
        prefixed = [n for n, _ in model.named_modules() if n.endswith(f".{name}")]
        advice = "do the masks belong to another model?"
        if prefixed:
            part = prefixed[0].removesuffix(f".{name}")
            advice = (
                f"it has a layer {prefixed[0]}. If the masks belong to its part {part!r}, pass "
                f"that module; in a LightningModule, set the attribute prunable_model to it"
            )
        raise ValueError(
            f"there is a mask for layer {name}, which {kind} does not have: {advice}"
        ) from None
    for layer in layers:
        shape, mask_shape = tuple(layer.shape), _shape(masks, layer.name)
        if shape != mask_shape:
            raise ValueError(
                f"the mask of layer {layer.name} is {mask_shape}, its weight {shape}: do the "
                f"masks belong to another model?"
            )
    return layers


def _shape(masks: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if isinstance(masks, PackedMasks):  # without unpacking
        bits, columns = masks.packed(name)
        return len(bits), columns
    mask = masks[name]
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask of layer {name} is {mask.dtype}, not bool: pass mask != 0")
    return tuple(mask.shape)
