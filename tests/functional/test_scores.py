from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import Unstructured
from symprune_lightning.functional.scores import (
    RI,
    RIA,
    Diagonal,
    LpRIA,
    Magnitude,
    OutputWanda,
    Score,
    StochRIA,
    Symmetric,
    SymWanda,
    Wanda,
)
from symprune_lightning.functional.statistics import Moments, Statistics

SCORES = [s for s in Score.__subclasses__() if s.__module__.startswith("symprune_lightning")]


def example(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x = torch.randn(50, columns, generator=generator) * torch.rand(columns, generator=generator)
    output = Moments.of(x.to(dtype) @ weight.T)
    return weight, Statistics(layer="a.b", input=Moments.of(x), output=output), x


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
    assert "Examples:" in inspect.getdoc(score)
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


@pytest.mark.parametrize("score", SCORES)
def test_statistics_that_are_needed_are_declared(score):
    if score().needs:
        with pytest.raises(ValueError, match="needs the statistic"):
            score()(torch.randn(2, 3), Statistics())
    else:
        score()(torch.randn(2, 3), Statistics())


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_identities(rows, columns, seed):
    weight, statistics, _ = example(rows, columns, seed)

    def same(one, other):
        torch.testing.assert_close(one(weight, statistics), other(weight, statistics))

    same(SymWanda(beta=0.0), Wanda())
    same(LpRIA(p=1.0, alpha=0.3), RIA(alpha=0.3))
    same(Diagonal(), RI())
    same(Diagonal(a=(1.0,) * columns, b=(1.0,) * rows), RI())
    same(StochRIA(tau=1.0, alpha=0.7), RIA(alpha=0.7))
    same(StochRIA(tau=1.0, alpha=0.0), RI())
    wanda_twice = Wanda()(weight, statistics) * 2
    torch.testing.assert_close(LpRIA(p=0.0, alpha=1.0)(weight, statistics), wanda_twice)
    masks = [Unstructured(0.5).mask(s(weight, statistics)) for s in (OutputWanda(), Magnitude())]
    assert torch.equal(*masks)


def test_formulas_of_the_symmetric_family():
    weight, statistics, x = example(5, 7)
    m = weight.abs()
    row, column = weight.norm(dim=1, keepdim=True), weight.norm(dim=0, keepdim=True)
    norm_x = x.square().mean(0).sqrt()
    norm_y = (x @ weight.T).square().mean(0).sqrt()[:, None]
    scaled = norm_y * norm_x.mean() / norm_y.mean()
    a, b = tuple(range(1, 8)), tuple(range(2, 7))
    expected = {
        OutputWanda(): m * norm_y,
        SymWanda(beta=0.5): m * (norm_x + 0.5 * scaled),
        Symmetric(): m * (row + column),
        Symmetric(form="rss"): m * (row**2 + column**2).sqrt(),
        LpRIA(p=2.0): (m / row + m / column) * norm_x.sqrt(),
        LpRIA(p=torch.inf, alpha=1.0): (m / m.amax(1, True) + m / m.amax(0)) * norm_x,
        Diagonal(a, b): m * torch.tensor(a) / m.sum(1, True)
        + m * torch.tensor(b)[:, None] / m.sum(0),
    }
    for score, values in expected.items():
        torch.testing.assert_close(score(weight, statistics), values, msg=str(score))


def test_stochastic_sums_are_over_a_sample():
    weight, statistics, _ = example(20, 50)
    score = StochRIA(tau=0.1, alpha=0.0)
    rows, columns = score._sample(weight.shape, "a.b")
    assert (len(rows), len(columns)) == (2, 5)
    assert [len(x) for x in StochRIA(equal_count=True)._sample(weight.shape, "a")] == [2, 2]
    m = weight.abs()
    expected = m / m[:, columns].sum(1, keepdim=True) + m / m[rows].sum(0)
    torch.testing.assert_close(score(weight, statistics), expected)


def test_samples_depend_on_the_layer_and_the_seed_only():
    torch.manual_seed(1)
    shape = torch.Size([30, 40])
    first = StochRIA()._sample(shape, "a")
    torch.manual_seed(2)
    again, layer, seed = (
        s._sample(shape, n)
        for s, n in ((StochRIA(), "a"), (StochRIA(), "b"), (StochRIA(seed=1), "a"))
    )
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], layer[1])
    assert not torch.equal(first[1], seed[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochRIA(tau=0.0), "tau is 0.0; it is a share"),
        (lambda: LpRIA(p=-1.0), "needs p at least 0"),
        (lambda: SymWanda(beta=-1.0), "at least 0"),
        (lambda: Symmetric(form="max"), "choose 'sum' or 'rss'"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_diagonal_of_the_wrong_length():
    with pytest.raises(ValueError, match="a has 2 values for 3 channels"):
        Diagonal(a=(1.0, 2.0))(torch.ones(2, 3), Statistics())
