"""Pruning little by little, while the model trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gradual:
    """The cubic schedule: sparsity grows during ``fit``, fast at first and slowly at the end.

    At optimizer step t the model has the share ``1 − (1 − (t − start) / (end − start))³`` of the
    final sparsity (Zhu and Gupta, 2017, equation 1, from a dense model).

    Attributes:
        end: Optimizer step before which the final sparsity is reached.
        start: Optimizer step at which the share is still 0; the first pruning is ``every`` later.
        every: Optimizer steps from one pruning to the next; each sends the calibration batches
            through the model.

    Raises:
        ValueError: The steps are not in order.

    Examples:
        >>> [round(Gradual(end=4).share(step), 3) for step in range(6)]
        [0.0, 0.578, 0.875, 0.984, 1.0, 1.0]
    """

    end: int
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.every < 1:
            raise ValueError(f"{self}: start must be 0 or more, end greater, every 1 or more")

    def share(self, step: int) -> float:
        """Share of the final sparsity that the model has after the pruning before ``step``."""
        left = 1 - (step - self.start) / (self.end - self.start)
        return 1 - min(1.0, max(0.0, left)) ** 3

    def is_due(self, step: int) -> bool:
        """Whether the model is pruned before this step."""
        if step == self.start or not self.start < step <= self.end:
            return False  # the share is nought, or it is all over
        return step == self.end or (step - self.start) % self.every == 0
