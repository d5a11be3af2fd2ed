"""Schedules of the learning rate and of the sparsity."""

from __future__ import annotations

import math

WARMUP = 0.05
"""Fraction of the steps in which the learning rate rises to its maximum."""


def warmup_cosine(step: int, total: int) -> float:
    """Return the learning-rate factor: linear warm-up, then cosine decay to zero.

    Args:
        step: Number of finished steps, below ``total``.
        total: Total number of steps.

    Returns:
        Factor in ``(0, 1]``.

    Examples:
        >>> [round(warmup_cosine(step, 5), 2) for step in range(5)]
        [0.5, 1.0, 0.85, 0.5, 0.15]
    """
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def cubic_growth(progress: float) -> float:
    """Return the fraction of the final sparsity: ``1 − (1 − progress)³``, arXiv 1710.01878, eq. 1.

    Args:
        progress: Fraction of the schedule that has passed; clamped to ``[0, 1]``.

    Examples:
        >>> [cubic_growth(progress) for progress in (-1.0, 0.0, 0.5, 1.0, 2.0)]
        [0.0, 0.0, 0.875, 1.0, 1.0]
    """
    remaining = min(1.0, max(0.0, 1 - progress))
    return 1 - remaining**3
