"""Placement of weights: which of them are in memory while batches run through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from symprune_lightning.engine.layers.base import Layer


class WeightPlacement:
    """Base class of weight placements, and the placement of a model that is fully in memory.

    Subclasses load one decoder block at a time: sharded by FSDP2, or streamed from disk. The
    scheduler suspends all batches before a block, loads it once, runs the batches through it, and
    unloads it after the last one has left. All ranks do so in lockstep, however many batches each
    of them has.

    Args:
        model: The model.
        blocks: Decoder blocks that batches wait in front of, in model order. Empty for a model in
            memory, unless hidden states are offloaded between blocks.
    """

    always_loaded: ClassVar[bool] = True
    """Whether a weight can be read and written when its block is not loaded."""

    current_block: nn.Module | None = None
    """The block that is loaded."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        self.model, self.blocks = model, list(blocks)

    @property
    def fingerprint(self) -> str | None:
        """Identifier of the weights; ``None`` if they can be hashed in memory."""
        return None

    @property
    def initially_loaded(self) -> set[nn.Module]:
        """Modules whose weights are in memory when a session begins."""
        modules = set(self.model.modules())
        if not self.always_loaded:
            modules -= {module for block in self.blocks for module in block.modules()}
        return modules

    def open(self, layers: Sequence[Layer]) -> None:
        """Load the weights outside the blocks; ``layers`` are those that will be pruned."""

    def load_block(self, block: nn.Module) -> None:
        """Load a block."""

    def record_change(self, module: nn.Module, change: Callable[[], None]) -> None:
        """Record a weight change of ``module`` so that it can be replayed on a stored copy."""

    def unload_block(self, block: nn.Module) -> None:
        """Unload a block, with its changes."""

    def close(self, *, complete: bool) -> None:
        """Release the weights outside the blocks; ``complete`` is False after an error."""

    @contextmanager
    def session(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Open the placement, and in the end unload the last block and close it."""
        self.current_block = None
        complete = False
        self.open(layers)
        try:
            yield
            self.load_only(None)
            complete = True
        finally:
            self.close(complete=complete)

    def load_only(self, block: nn.Module | None) -> None:
        """Load ``block`` and unload the one that was loaded."""
        if self.current_block is not None:
            self.unload_block(self.current_block)
        self.current_block = None
        if block is not None:
            self.load_block(block)
        self.current_block = block

    def for_each_block(
        self, layers: Sequence[Layer], prune: Callable[[Sequence[Layer]], None]
    ) -> None:
        """Call ``prune`` on all layers; block by block if their weights are not always loaded."""
        remaining = list(layers)
        for block in () if self.always_loaded else self.blocks:
            self.load_only(block)
            modules = set(block.modules())
            prune([layer for layer in remaining if layer.module in modules])
            remaining = [layer for layer in remaining if layer.module not in modules]
        self.load_only(None)
        prune(remaining)
