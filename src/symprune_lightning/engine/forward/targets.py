"""Targets of block reconstruction: what a block returned while it was dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from symprune_lightning.engine.forward.batch import SuspendedBatch, current_batch
from symprune_lightning.engine.forward.block import (
    BlockCall,
    call_on_copies,
    first_tensor,
    hidden_states,
)
from symprune_lightning.engine.forward.modes import TorchModes


class BlockTargets:
    """Records the calls of blocks for their reconstruction, each with its target.

    Args:
        dense: Whether the targets are the hidden states of the dense model: each batch then carries
            these along with its own, and every block is called once more. If not, they are what the
            dense block returns for the inputs that come through the pruned blocks before it.

    Attributes:
        detached_blocks: Blocks whose input is not the output of the block before. Their targets are
            those of their own inputs, whatever ``dense`` says.
    """

    def __init__(self, *, dense: bool) -> None:
        self.dense = dense
        self.detached_blocks: set[nn.Module] = set()

    @contextmanager
    def watch(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Keep the outputs of pruned blocks inside the context, if targets are dense."""
        with ExitStack() as stack:
            for block in blocks if self.dense else ():
                stack.callback(block.register_forward_hook(_keep_output).remove)
            yield

    def record(
        self,
        batch: SuspendedBatch,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: object,
    ) -> None:
        """Record the call of a block that is still dense.

        Args:
            batch: The running batch.
            block: The block.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned for these arguments.

        Raises:
            ValueError: The output holds no floating-point tensor.
        """
        target = first_tensor(output)
        if target is None:
            raise ValueError(
                f"reconstruct needs blocks that return hidden states, but "
                f"{type(block).__name__} returned {type(output).__name__} without a "
                f"floating-point tensor"
            )
        if self.dense:
            target = batch.dense_states = self._dense_output(batch, block, args, kwargs, target)
        batch.block_call = BlockCall(batch.number, args, kwargs, target, batch.valid, TorchModes())

    def _dense_output(
        self,
        batch: SuspendedBatch,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        """Return what the block returns in the dense model; ``output`` for the first block."""
        if batch.dense_states is None or batch.last_output is None:
            return output
        if not _is_chained(args, kwargs, batch.last_output):
            self.detached_blocks.add(block)
            return output
        batch.is_computing_target = True
        dense = first_tensor(call_on_copies(block, args, kwargs, batch.dense_states))
        batch.is_computing_target = False
        assert dense is not None
        return dense


def _is_chained(args: tuple[Any, ...], kwargs: dict[str, Any], last: Tensor) -> bool:
    """Return whether the output of the block before is all that a block gets from other blocks.

    A second tensor of hidden states, such as a residual or the output of an encoder, also comes
    through pruned blocks, and its value in the dense model is unknown.
    """
    x = hidden_states(args, kwargs)
    if x is None or (x.shape, x.dtype, x.device) != (last.shape, last.dtype, last.device):
        return False
    for other in tree_leaves((args, kwargs)):
        if not isinstance(other, Tensor) or not other.is_floating_point() or other is x:
            continue
        if other.dim() == x.dim() and other.shape[-1] == x.shape[-1]:
            return False
    return torch.equal(x, last)


def _keep_output(block: nn.Module, args: object, output: object) -> None:
    """Keep the output of a pruned block, to recognise it as the input of the next one."""
    batch = current_batch()
    if batch is not None and not (batch.is_measuring or batch.is_computing_target):
        batch.last_output = first_tensor(output)
