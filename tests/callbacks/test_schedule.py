"""The cubic schedule of Zhu and Gupta (arXiv 1710.01878, equation 1)."""

from __future__ import annotations

import pytest

from symprune_lightning import CubicSchedule


def test_fraction_follows_equation_1():
    schedule = CubicSchedule(start=10, end=50, every=10)
    final, initial, pruning_steps = 0.8, 0.0, 4
    for step in range(10, 51, 10):
        ratio = (step - 10) / (pruning_steps * 10)
        expected = final + (initial - final) * (1 - ratio) ** 3
        assert final * schedule.fraction(step) == pytest.approx(expected)


def test_fraction_is_constant_outside_the_schedule():
    schedule = CubicSchedule(start=10, end=50)
    assert schedule.fraction(0) == schedule.fraction(10) == 0
    assert schedule.fraction(50) == schedule.fraction(1000) == 1


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (CubicSchedule(end=4), [1, 2, 3, 4]),
        (CubicSchedule(start=2, end=10, every=4), [6, 10]),
        (CubicSchedule(start=2, end=11, every=4), [6, 10, 11]),  # the end is always due
        (CubicSchedule(end=3, every=10), [3]),
    ],
)
def test_due_steps(schedule, steps):
    assert [step for step in range(20) if schedule.is_due(step)] == steps


@pytest.mark.parametrize(
    "options", [{"end": 0}, {"end": 3, "start": 3}, {"end": 3, "every": 0}, {"end": 3, "start": -1}]
)
def test_invalid_steps(options):
    with pytest.raises(ValueError, match="start must be at least 0"):
        CubicSchedule(**options)
