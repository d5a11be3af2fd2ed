"""Convolutions in one to three dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from symprune_lightning.engine.layers.base import Layer, LayerKind, Visit, follow_gradient

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@dataclass(frozen=True)
class GroupView:
    """The matrix of one group of a convolution.

    Attributes:
        group: Index of the group.
        groups: Number of groups.
    """

    group: int
    groups: int

    def __call__(self, parameter: Tensor) -> Tensor:
        """Return the view ``(out_channels / groups, in_channels / groups · kernel)``."""
        rows = len(parameter) // self.groups
        return parameter[self.group * rows : (self.group + 1) * rows].flatten(1)


class ConvolutionKind(LayerKind):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, as a matrix product with patches.

    An input is the patch that a kernel covers, and each output position is a token. The groups of a
    grouped convolution are layers, named ``conv.0``, ``conv.1``. Depthwise convolutions have one
    input channel for each group and are no layers: an output would lose part of its only input.
    """

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        if not isinstance(module, Convolution) or is_depthwise(module):
            return []
        # a subclass may pad in its forward, or normalise its weight
        if type(module).forward not in FORWARDS or "weight" not in module._parameters:
            return []
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        return [
            Layer(
                name if module.groups == 1 else f"{name}.{group}",
                module,
                self,
                view=GroupView(group, module.groups),
                input_key=(geometry, group, module.groups),
            )
            for group in range(module.groups)
        ]

    @contextmanager
    def watch(self, module: nn.Module, layers: Sequence[Layer], visit: Visit) -> Iterator[None]:
        """See `LayerKind`."""
        assert isinstance(module, Convolution)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            inputs = patches(module, x)
            for layer in layers:
                visit(layer, inputs[_group(layer)])

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def watch_gradients(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> Iterator[None]:
        """See `LayerKind`."""
        assert isinstance(module, Convolution)
        groups, dims = module.groups, len(module.kernel_size)

        def visit_all(gradient: Tensor) -> None:
            parts = gradient.movedim(-dims - 1, -1).chunk(groups, -1)
            for layer in layers:
                visit(layer, parts[_group(layer)])

        def hook(_: nn.Module, args: object, output: Tensor) -> Tensor:
            return follow_gradient(output, visit_all)

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def is_depthwise(module: Convolution) -> bool:
    """Return whether each input channel has a kernel of its own."""
    return module.groups > 1 and module.groups == module.in_channels


def patches(module: Convolution, x: Tensor) -> Tensor:
    """Return the inputs of a convolution as a matrix product.

    Args:
        module: The convolution.
        x: Its input, ``(batch, channels, ...)`` or without the batch.

    Returns:
        ``(groups, batch, positions, channels / groups · kernel)``; without the batch if ``x`` has
        none.
    """
    dims = len(module.kernel_size)
    if any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i in range(dims):
        dilation, size = module.dilation[i], module.kernel_size[i]
        span = dilation * (size - 1) + 1
        # the windows become the last dimension
        x = x.unfold(x.dim() - dims, span, module.stride[i])[..., ::dilation]
    channel = x.dim() - 2 * dims - 1
    x = x[None] if module.groups == 1 else torch.stack(x.chunk(module.groups, channel))
    channel += 1  # of a group
    x = x.movedim(channel, x.dim() - dims - 1)
    x = x.flatten(x.dim() - dims - 1)  # channels and kernel
    return x.flatten(x.dim() - 1 - dims, x.dim() - 2)


def _group(layer: Layer) -> int:
    assert isinstance(layer.view, GroupView)
    return layer.view.group
