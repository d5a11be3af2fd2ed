"""Sparsity schedules over training steps."""

from __future__ import annotations

from dataclasses import dataclass

from symprune_lightning.functional.schedule import cubic_growth


@dataclass(frozen=True)
class CubicSchedule:
    """Cubic sparsity schedule: sparsity grows during ``fit``, fast at first and slowly at the end.

    At optimizer step t the model has the fraction ``1 − (1 − (t − start) / (end − start))³`` of the
    final sparsity (Zhu and Gupta, arXiv 1710.01878, equation 1, from a dense model).

    Attributes:
        end: Optimizer step before which the final sparsity is reached, as ``Trainer.global_step``
            counts them.
        start: Optimizer step at which the fraction is still 0; the first pruning is ``every``
            steps later.
        every: Optimizer steps between two prunings; each runs the calibration batches through the
            model.

    Raises:
        ValueError: The steps are not in order.

    Examples:
        >>> [round(CubicSchedule(end=4).fraction(step), 3) for step in range(6)]
        [0.0, 0.578, 0.875, 0.984, 1.0, 1.0]
    """

    end: int
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end or self.every < 1:
            raise ValueError(
                f"{self}: start must be at least 0, end greater than start, every at least 1"
            )

    def fraction(self, step: int) -> float:
        """Return the fraction of the final sparsity after the pruning before ``step``."""
        return cubic_growth((step - self.start) / (self.end - self.start))

    def is_due(self, step: int, last: int = -1) -> bool:
        """Return whether the model has to be pruned before ``step``.

        With several optimizers, ``Trainer.global_step`` counts the steps of all of them and passes
        over numbers; a step that was passed over is made up for.

        Args:
            step: The next optimizer step.
            last: The step before which the model was last pruned; -1 if it was not.
        """
        due = self.start + (min(step, self.end) - self.start) // self.every * self.every
        if step >= self.end:
            due = self.end
        return due > max(last, self.start)
