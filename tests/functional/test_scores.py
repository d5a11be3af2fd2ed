from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.scores import RI, RIA, Magnitude, Score, Wanda
from symprune_lightning.functional.statistics import Moments, Statistics

SCORES = [s for s in Score.__subclasses__() if s.__module__.startswith("symprune_lightning")]


def example(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x = torch.randn(50, columns, generator=generator) * torch.rand(columns, generator=generator)
    return weight, Statistics(input=Moments.of(x)), x


@pytest.mark.parametrize("score", SCORES)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_contract(score, rows, columns, seed, dtype):
    """Same shape and dtype, finite, never negative, zero for zero weights, sign-blind."""
    weight, statistics, _ = example(rows, columns, seed, dtype)
    weight[0] = 0
    values = score()(weight, statistics)
    assert values.shape == weight.shape
    assert values.dtype == dtype
    assert values.isfinite().all()
    assert (values >= 0).all()
    assert (values[0] == 0).all()
    assert torch.equal(values, score()(-weight, statistics))


@pytest.mark.parametrize("score", SCORES)
def test_is_a_frozen_dataclass_with_docs(score):
    assert score.__dataclass_params__.frozen
    assert "Example:" in inspect.getdoc(score)
    assert by_name(Score, score.__name__.lower()) == score()


def test_formulas():
    weight, statistics, x = example(5, 7)
    norm = x.double().square().mean(0).sqrt().float()
    importance = weight.abs() / weight.abs().sum(1, keepdim=True) + weight.abs() / weight.abs().sum(
        0
    )
    torch.testing.assert_close(Magnitude()(weight, statistics), weight.abs())
    torch.testing.assert_close(Wanda()(weight, statistics), weight.abs() * norm)
    torch.testing.assert_close(RI()(weight, statistics), importance)
    torch.testing.assert_close(RIA()(weight, statistics), importance * norm.sqrt())
    torch.testing.assert_close(RIA(alpha=1.0)(weight, statistics), importance * norm)


def test_ria_with_alpha_zero_is_ri():
    weight, statistics, _ = example(5, 7)
    assert torch.equal(RIA(alpha=0.0)(weight, statistics), RI()(weight, statistics))


@pytest.mark.parametrize("score", [s for s in SCORES if not s.needs])
def test_scores_without_needs_take_no_statistics(score):
    score()(torch.randn(2, 3), Statistics())
