"""The cubic schedule of Zhu and Gupta (arXiv 1710.01878, equation 1)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert due(schedule, range(20)) == steps


def due(schedule: CubicSchedule, steps: Iterable[int]) -> list[int]:
    """Return the steps before which a callback prunes, as ``global_step`` passes through some."""
    pruned = [-1]
    for step in steps:
        if schedule.is_due(step, pruned[-1]):
            pruned.append(step)
    return pruned[1:]


@given(
    start=st.integers(0, 20),
    length=st.integers(1, 40),
    every=st.integers(1, 15),
    stride=st.integers(1, 7),
    resume=st.integers(0, 100),
)
def test_steps_that_are_passed_over(start, length, every, stride, resume):
    """Whatever steps the Trainer counts, every due step is made up for, and the end is reached."""
    schedule = CubicSchedule(start=start, end=start + length, every=every)
    steps = range(resume, start + length + stride, stride)
    pruned = due(schedule, steps)
    if any(step >= schedule.end for step in steps):
        assert pruned
        assert pruned[-1] >= schedule.end
        assert [schedule.fraction(step) for step in pruned].count(1.0) == 1
    scheduled = due(schedule, range(schedule.end + 1))
    for step in scheduled:
        following = [s for s in steps if s >= step]
        assert not following or following[0] in pruned
    assert len(pruned) <= len(scheduled)


@pytest.mark.parametrize(
    "options", [{"end": 0}, {"end": 3, "start": 3}, {"end": 3, "every": 0}, {"end": 3, "start": -1}]
)
def test_invalid_steps(options):
    with pytest.raises(ValueError, match="start must be at least 0"):
        CubicSchedule(**options)
