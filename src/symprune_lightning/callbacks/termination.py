"""SIGTERM while a model is pruned: all ranks stop after the same layer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.result import LayerReport

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM has ended, as of a shell."""


class StopOnSigterm(PruningHooks):
    """Raises ``SIGTERMException`` after the layer during which any rank has received SIGTERM.

    Args:
        communicator: The ranks, which agree after every layer.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.received = False
        self._communicator = communicator

    def on_layer_pruned(self, report: LayerReport, mask: Tensor) -> None:
        """See `PruningHooks`."""
        self.stop_if_received()

    def on_reconstruction_epoch(self, block: str, epoch: int, error: float) -> None:
        """See `PruningHooks`."""
        self.stop_if_received()

    def stop_if_received(self) -> None:
        """Raise ``SIGTERMException`` if any rank has received the signal; a collective."""
        if self._communicator.all_reduce_max(int(self.received)):
            raise SIGTERMException(EXIT_CODE)


def raise_if_terminated(trainer: Trainer) -> None:
    """Raise ``SIGTERMException`` if SIGTERM has arrived after the last batch of an evaluation."""
    if trainer.received_sigterm:
        raise SIGTERMException(EXIT_CODE)


@contextmanager
def stop_on_sigterm(trainer: Trainer, communicator: Communicator) -> Iterator[StopOnSigterm]:
    """Replace the handler of SIGTERM, and yield the observer that stops the run.

    Lightning's handler is not used: it takes effect at the next evaluation or training batch, which
    can be an hour away, and broadcasts from within the handler, between other collectives.

    Args:
        trainer: The Trainer, whose launcher passes the signal on to the processes it has started.
        communicator: The ranks that prune together.
    """
    observer = StopOnSigterm(communicator)
    if threading.current_thread() is not threading.main_thread():
        yield observer  # only the main thread can set handlers
        return

    def handle(number: int, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not observer.received:
            launcher.kill(signal.SIGTERM)
        observer.received = True

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield observer
        observer.stop_if_received()  # after the last layer
    finally:
        signal.signal(signal.SIGTERM, previous)
