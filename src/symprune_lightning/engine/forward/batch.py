"""A calibration batch that can be suspended in the middle of the model's forward."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import greenlet
from torch import Tensor, nn

from symprune_lightning.engine.forward.attributes import ForwardAttributes
from symprune_lightning.engine.forward.block import BlockCall
from symprune_lightning.engine.forward.modes import isolated_modes
from symprune_lightning.engine.forward.recorder import LastInput


class SuspendedBatch(greenlet.greenlet):
    """One batch, whose forward runs in a greenlet of its own.

    A greenlet is a call stack that can be left and entered again: the forward stops inside a hook,
    with all its local variables alive, and continues when it is resumed.

    Args:
        run: The forward.
        valid: Bool, one per token: False where it is padding; ``None`` without padding.
        number: Global index of the batch over all ranks.
        attributes: Those of the model that a forward may change.
    """

    def __init__(
        self,
        run: Callable[[], object],
        valid: Tensor | None,
        number: int,
        attributes: ForwardAttributes,
    ) -> None:
        super().__init__(run)
        self.attributes = attributes
        self.gr_context = contextvars.copy_context()
        self.valid = valid
        self.number = number
        self.last_input = LastInput()
        self.is_measuring = False
        """Whether layers record their inputs although the batch does not wait at them."""
        self.trace: list[nn.Module] | None = None
        """The modules whose layers were used, for a batch that only traces their order."""
        self.is_computing_target = False
        """True while a block is called to compute the target of its reconstruction."""
        self.block_call: BlockCall | None = None
        """The call of the block that the batch waits at, if blocks are reconstructed."""
        self.dense_states: Tensor | None = None
        """The dense model's output of the last block, if blocks are trained to return it."""
        self.last_output: Tensor | None = None
        """The output of the last pruned block, if ``dense_states`` are computed."""
        self.is_exiting = False
        """Whether the forward ends at the next layer that is not pruned."""
        self.wait_point: Hashable = None
        """The wait point at which the batch is suspended, ``None`` while it runs."""
        self.finished_block: tuple[nn.Module, object] | None = None
        """The block whose forward already ran outside the hooks of FSDP, and its output."""

    def wait_at(self, wait_point: Hashable) -> None:
        """Switch to the scheduler; return when it resumes this batch."""
        self.wait_point = wait_point
        assert self.parent is not None
        with self._isolated():  # other batches run before this one continues
            self.parent.switch()
        self.wait_point = None

    def resume(self) -> None:
        """Run until the batch waits or ends; an exception of its forward is raised here."""
        with self._isolated():
            self.switch()

    def end(self) -> None:
        """Unwind a suspended batch with ``GreenletExit``, so that ``finally`` clauses run."""
        if not self.dead:
            with self._isolated():
                self.throw()

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Restore what the forwards of batches may change, at the end of a switch."""
        with isolated_modes(), self.attributes.isolated():
            yield


def current_batch() -> SuspendedBatch | None:
    """Return the running batch; ``None`` if a hook is called from outside the run."""
    batch = greenlet.getcurrent()
    return batch if isinstance(batch, SuspendedBatch) else None


def exit_forward() -> None:
    """End the forward of the running batch without an error."""
    raise greenlet.GreenletExit


@contextmanager
def replay_finished_blocks(block: nn.Module) -> Iterator[None]:
    """Return the saved output of a block that already ran for the current batch; else call it.

    A pre-hook can change the arguments of a forward, but cannot skip it. The instance's attribute
    shadows the method of the class; it is removed afterwards, unless there was one already
    (accelerate and others patch instances in the same way).
    """
    before = block.__dict__.get("forward")
    block.forward = partial(_replay_or_call, block, block.forward)
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _replay_or_call(
    block: nn.Module, forward: Callable[..., object], *args: Any, **kwargs: Any
) -> object:
    batch = current_batch()
    if batch is not None and batch.finished_block is not None:
        finished, output = batch.finished_block
        if finished is block:
            batch.finished_block = None
            return output
    return forward(*args, **kwargs)
