"""Where weights are while no batch needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from torch import nn

if TYPE_CHECKING:
    from symprune_lightning.engine.layers import Layer


class Residence:
    """A model of which one decoder block at a time has to be in memory.

    The scheduler holds all batches before a block, enters it once, sends the batches through, and
    leaves it when the last has come out. All processes of a group do so together, however many
    batches each has.

    This one is for a model that is in memory all the time: batches wait before each block, and
    nothing comes or goes. Others say where the weights are by ``open``, ``enter``, ``leave`` and
    ``close``.

    Args:
        model: The model.
        blocks: The blocks that come and go, in model order.
    """

    readable: ClassVar[bool] = True
    """Whether a weight can be read and written when its block is not in memory."""

    inside: nn.Module | None = None
    """The block that is in memory."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        self.model, self.blocks = model, blocks

    @property
    def identity(self) -> str | None:
        """What tells the weights from others, where they can't be read at once."""
        return None

    def open(self) -> None:
        """Bring what lies outside the blocks into memory."""

    def enter(self, block: nn.Module) -> None:
        """Bring a block into memory."""

    def changed(self, module: nn.Module, change: Callable[[], None]) -> None:
        """A module's weight was changed by this call, to be repeated where a copy is kept."""

    def leave(self, block: nn.Module) -> None:
        """Put a block away, with its changes."""

    def close(self, *, complete: bool) -> None:
        """Put the rest away; ``complete`` if nothing went wrong."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open, and in the end leave the last block and close."""
        self.inside = None
        complete = False
        self.open()
        try:
            yield
            self.move_to(None)
            complete = True
        finally:
            self.close(complete=complete)

    def move_to(self, block: nn.Module | None) -> None:
        """Have this block in memory, and no other."""
        if self.inside is not None:
            self.leave(self.inside)
        self.inside = None
        if block is not None:
            self.enter(block)
        self.inside = block

    def visit(self, layers: Sequence[Layer], prune: Callable[[Sequence[Layer]], None]) -> None:
        """Prune layers without a forward; block by block, where weights can't be read otherwise."""
        left = list(layers)
        for block in () if self.readable else self.blocks:
            self.move_to(block)
            inside = set(block.modules())
            prune([layer for layer in left if layer.module in inside])
            left = [layer for layer in left if layer.module not in inside]
        self.move_to(None)
        prune(left)
