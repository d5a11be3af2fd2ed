"""Where weights are while no batch needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import nn

if TYPE_CHECKING:
    from symprune_lightning.engine.layers import Layer


class Residence(ABC):
    """A model of which one decoder block at a time is whole in memory.

    The scheduler holds all batches before a block, calls ``enter`` once, sends the batches through,
    and calls ``leave`` when the last has come out. All processes of a group do so together, however
    many batches each has.

    Attributes:
        model: The model.
        blocks: The blocks that come and go, in model order.
    """

    model: nn.Module
    blocks: list[nn.Module]

    readable: ClassVar[bool] = True
    """Whether a weight can be read and written when its block is not in memory."""

    @abstractmethod
    def open(self) -> None:
        """Bring what lies outside the blocks into memory."""

    @abstractmethod
    def enter(self, block: nn.Module) -> None:
        """Bring a block into memory."""

    @abstractmethod
    def changed(self, change: Callable[[], None]) -> None:
        """A weight was changed by this call; where another copy is kept, it has to be repeated."""

    @abstractmethod
    def leave(self, block: nn.Module) -> None:
        """Put a block away, with its changes."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """Put the rest away; ``complete`` if nothing went wrong."""

    def visit(self, layers: Sequence[Layer], prune: Callable[[Sequence[Layer]], None]) -> None:
        """Prune layers without a forward; block by block, where weights can't be read otherwise."""
        left = list(layers)
        for block in () if self.readable else self.blocks:
            self.enter(block)
            inside = set(block.modules())
            prune([layer for layer in left if layer.module in inside])
            left = [layer for layer in left if layer.module not in inside]
            self.leave(block)
        prune(left)


class Resident(Residence):
    """A model that is in memory all the time; batches still wait before each block.

    Args:
        model: The model.
        blocks: Its decoder blocks.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        self.model, self.blocks = model, blocks

    def open(self) -> None:
        """Nothing to do."""

    def enter(self, block: nn.Module) -> None:
        """Nothing to do."""

    def changed(self, change: Callable[[], None]) -> None:
        """Nothing to do."""

    def leave(self, block: nn.Module) -> None:
        """Nothing to do."""

    def close(self, *, complete: bool) -> None:
        """Nothing to do."""
