"""Changes of layers, and masks, by the parameters that store them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from symprune_lightning.engine.distributed.dtensor import local_tensor, shard_like
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.functional.tensors import zero_


@dataclass(frozen=True)
class LayerChange:
    """A change of a layer's weight, which can be applied again to a stored copy.

    Attributes:
        layer: The layer.
        mask: Bool, ``(out_features, in_features)``, True = kept.
        weight: The new weight; ``None`` if kept weights are unchanged.
    """

    layer: Layer
    mask: Tensor
    weight: Tensor | None

    def __call__(self) -> None:
        """Apply the change."""
        if self.weight is None:
            self.layer.mask_(self.mask)
        else:
            self.layer.copy_(self.weight)


def zero_masks(
    layers: Iterable[Layer], masks: Mapping[str, Tensor]
) -> dict[tuple[nn.Module, str], Tensor]:
    """Return where stored parameters are pruned, on this rank's shards.

    One tensor for each parameter, also where a parameter holds many layers.

    Args:
        layers: The layers.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Returns:
        Module and parameter name to bool in the shape of the local parameter, True = pruned.
    """
    members: dict[tuple[nn.Module, str], list[Layer]] = {}
    for layer in layers:
        members.setdefault((layer.module, layer.parameter_name), []).append(layer)
    pruned: dict[tuple[nn.Module, str], Tensor] = {}
    for key, group in members.items():
        parameter = group[0].parameter
        stored = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        for layer in group:
            layer.view(stored).copy_(~masks[layer.name])
        pruned[key] = shard_like(stored, parameter)  # at once: the full tensor is not kept
    return pruned


def apply_changes(changes: Sequence[LayerChange]) -> None:
    """Apply changes of layers; those of one sharded parameter together.

    Each change of a shard distributes a tensor of the parameter's shape: one by one, the experts of
    a packed parameter would do so for each of them.
    """
    by_parameter: dict[tuple[nn.Module, str], list[LayerChange]] = {}
    for change in changes:
        key = (change.layer.module, change.layer.parameter_name)
        by_parameter.setdefault(key, []).append(change)
    for group in by_parameter.values():
        if len(group) == 1 or any(change.weight is not None for change in group):
            for change in group:
                change()
            continue
        layers = [change.layer for change in group]
        pruned = zero_masks(layers, {c.layer.name: c.mask for c in group})
        for mask in pruned.values():
            with torch.no_grad():
                zero_(local_tensor(layers[0].parameter), mask)
