from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.patterns import Unstructured
from symprune_lightning.functional.scores import (
    RI,
    RIA,
    Diagonal,
    LpRIA,
    Magnitude,
    OutputWanda,
    StochRIA,
    Symmetric,
    SymWanda,
    Wanda,
)
from symprune_lightning.functional.statistics import Moments, Statistics


def example(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x = torch.randn(50, columns, generator=generator) * torch.rand(columns, generator=generator)
    output = Moments.of(x.to(dtype) @ weight.T)
    return weight, Statistics(layer="a.b", input=Moments.of(x), output=output), x


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
        Symmetric(): m * (row**2 + column**2).sqrt(),
        Symmetric(form="sum"): m * (row + column),
        LpRIA(p=2.0): (m / row + m / column) * norm_x.sqrt(),
        LpRIA(p=torch.inf, alpha=1.0): (m / m.amax(1, True) + m / m.amax(0)) * norm_x,
        Diagonal(a, b): m
        * (torch.tensor(a) / m.sum(0) + torch.tensor(b)[:, None] / m.sum(1, True)),
    }
    for score, values in expected.items():
        torch.testing.assert_close(score(weight, statistics), values, msg=str(score))


def test_symmetric_is_by_default_the_form_of_the_paper():
    assert Symmetric() == Symmetric(form="rss")


def test_diagonal_is_the_symmetric_score_of_diagonal_matrices():
    """``|W|·(‖X_r‖ + ‖Y_q‖)`` with ``X = diag(a/L1col)`` and ``Y = diag(b/L1row)``."""
    weight, statistics, _ = example(5, 7)
    a, b = torch.arange(1.0, 8), torch.arange(2.0, 7)
    x = torch.diag(a / weight.abs().sum(0))
    y = torch.diag(b / weight.abs().sum(1))
    expected = weight.abs() * (x.norm(dim=0) + y.norm(dim=1)[:, None])
    score = Diagonal(tuple(a.tolist()), tuple(b.tolist()))
    torch.testing.assert_close(score(weight, statistics), expected)


def stochastic_factors(score, weight, statistics):
    """Return ``1/row sum + 1/column sum`` of the sample, which must be a matrix of this form."""
    factor = (score(weight, statistics) / weight.abs()).double()
    columns = factor - factor[:, :1]
    torch.testing.assert_close(columns, columns[:1].expand_as(columns), rtol=1e-4, atol=1e-4)
    return factor


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (20, 60)])
@pytest.mark.parametrize("equal_count", [False, True])
def test_stochastic_sums_have_the_size_of_the_sample(rows, columns, equal_count):
    """With equal weights, a sum over n of them is n."""
    for tau in (0.1, 0.3, 0.75):
        smaller = min(rows, columns)
        counts = (smaller, smaller) if equal_count else (rows, columns)
        per_column, per_row = (int(tau * count) for count in counts)
        score = StochRIA(tau=tau, alpha=0.0, equal_count=equal_count)
        values = score(torch.ones(rows, columns), Statistics(layer="a"))
        expected = torch.full((rows, columns), 1 / per_row + 1 / per_column)
        torch.testing.assert_close(values, expected)


def test_every_channel_is_sampled_with_probability_tau():
    tau, seeds = 0.2, 400
    weight = torch.ones(30, 50)
    weight[:, 7] = 1e6  # row sums are 10, or about 1e6 if the sample contains this column
    sampled = 0
    for seed in range(seeds):
        values = StochRIA(tau=tau, alpha=0.0, seed=seed)(weight, Statistics(layer="a"))
        per_row = values[:, 0] - 1 / 6
        torch.testing.assert_close(per_row, per_row[:1].expand(30))
        sampled += bool(per_row[0] < 0.05)
    assert abs(sampled / seeds - tau) < 4 * (tau * (1 - tau) / seeds) ** 0.5


def test_samples_depend_on_the_layer_and_the_seed_only():
    weight, _, _ = example(30, 40)

    def factors(name="a", **options):
        statistics = Statistics(layer=name)
        return stochastic_factors(StochRIA(alpha=0.0, **options), weight, statistics)

    torch.manual_seed(1)
    first = factors()
    torch.manual_seed(2)
    assert torch.equal(first, factors())
    state = torch.get_rng_state()
    for other in (factors("b"), factors(seed=1)):
        # both samples differ: the sums of rows and those of columns
        assert not torch.allclose(first[:, :1] - first[:1, :1], other[:, :1] - other[:1, :1])
        assert not torch.allclose(first[:1] - first[:1, :1], other[:1] - other[:1, :1])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not used"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochRIA(tau=0.0), "tau is 0.0; it is a fraction"),
        (lambda: LpRIA(p=-1.0), "needs p at least 0"),
        (lambda: SymWanda(beta=-1.0), "at least 0"),
        (lambda: Symmetric(form="max"), "choose 'rss' or 'sum'"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_diagonal_of_the_wrong_length():
    with pytest.raises(ValueError, match="a has 2 values for 3 channels"):
        Diagonal(a=(1.0, 2.0))(torch.ones(2, 3), Statistics())
