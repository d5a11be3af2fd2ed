from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional import obs
from symprune_lightning.functional.obs import inverse_factor
from symprune_lightning.functional.patterns import NM, Unstructured
from symprune_lightning.functional.statistics import Statistics
from symprune_lightning.functional.update import MaskedCG, OBSUpdate
from tests.functional.examples import correlated, example


@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_pruned_weights_are_zero(rows, columns, dtype, seed):
    weight, mask, statistics = example(rows, columns, seed=seed, dtype=dtype)
    before = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damping may have to be raised
        updated = OBSUpdate()(weight, mask, statistics)
    assert torch.equal(weight, before)
    assert (updated[~mask] == 0).all()
    assert updated.isfinite().all()
    assert updated.dtype == dtype


def test_update_lowers_the_error_far():
    weight, statistics = correlated()
    mask = Unstructured(0.5).mask(weight.abs())
    updated = OBSUpdate()(weight, mask, statistics)
    masked = statistics.squared_error(weight.masked_fill(mask, 0)).sum()
    assert statistics.squared_error(weight - updated).sum() < 0.9 * masked


def test_sweep_equals_optimal_brain_surgeon_column_by_column():
    """Algorithm 1 by explicit inverses of the remaining columns, without any factor."""
    weight, statistics = correlated(rows=3, columns=7)
    mask = Unstructured(0.5).mask(weight.abs())
    hessian = statistics.gram + 0.01 * statistics.gram.diagonal().mean() * torch.eye(7).double()
    expected = weight.double().clone()
    for i in range(7):
        inverse = torch.linalg.inv(hessian[i:, i:])
        error = expected[:, i].masked_fill(mask[:, i], 0) / inverse[0, 0]
        expected[:, i:] -= error[:, None] * inverse[0]
    updated = OBSUpdate()(weight.double(), mask, statistics)
    torch.testing.assert_close(updated, expected.masked_fill(~mask, 0))


@pytest.mark.parametrize("block", [1, 5, 8, 128])
def test_blocks_do_not_change_the_sweep(block, monkeypatch):
    weight, statistics = correlated()
    mask = NM(2, 4).mask(weight.abs())
    expected = OBSUpdate()(weight.double(), mask, statistics)
    monkeypatch.setattr(obs, "BLOCK", block)
    torch.testing.assert_close(OBSUpdate()(weight.double(), mask, statistics), expected)


def test_damping_is_raised_with_a_warning():
    vector = torch.ones(6, 1).double()
    statistics = Statistics(layer="model.q", gram=vector @ vector.T)
    with pytest.warns(UserWarning, match=r"layer model.q: .* can't be factored with damping 0;"):
        factor = inverse_factor(statistics, 0.0, torch.float32)
    assert factor.isfinite().all()


def test_gram_matrix_that_is_not_finite():
    statistics = Statistics(layer="model.q", gram=torch.full((3, 3), torch.nan).double())
    with pytest.raises(ValueError, match=r"layer model.q can't be factored with any"):
        inverse_factor(statistics, 0.01, torch.float32)


def test_zero_weights_stay_zero():
    weight, statistics = correlated()
    weight[:, 3] = 0
    mask = torch.ones_like(weight).bool()
    mask[:, 0] = False
    assert (OBSUpdate()(weight, mask, statistics)[:, 3] == 0).all()


def test_conjugate_gradients_converge_to_the_normal_equations_of_each_row():
    weight, statistics = correlated()
    weight = weight.double()
    mask = Unstructured(0.5).mask(weight.abs())
    updated = MaskedCG(steps=500, tolerance=1e-12)(weight, mask, statistics)
    gram = statistics.gram_matrix
    for q, kept in enumerate(mask):
        exact = torch.linalg.solve(gram[kept][:, kept], (gram @ weight[q])[kept])
        torch.testing.assert_close(updated[q, kept], exact, rtol=1e-6, atol=1e-8)


@given(steps=st.integers(1, 12), seed=st.integers(0, 50), tokens=st.sampled_from([3, 8, 200]))
def test_conjugate_gradients_never_raise_the_error_of_a_row(steps, seed, tokens):
    """Also for a singular Gram matrix, of fewer tokens than inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-3, 2, 16, dtype=torch.float64)
    weight = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    statistics = Statistics(gram=x.T @ x / tokens)
    mask = Unstructured(0.5).mask(weight.abs())
    errors = [statistics.squared_error(weight * ~mask)]
    for count in range(1, steps + 1):
        updated = MaskedCG(steps=count)(weight, mask, statistics)
        errors.append(statistics.squared_error(weight - updated))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-9) + 1e-12 * errors[0].max()).all()


def test_conjugate_gradients_beat_the_column_sweep():
    weight, statistics = correlated()
    mask = Unstructured(0.6).mask(weight.abs())
    sweep = statistics.squared_error(weight - OBSUpdate()(weight, mask, statistics)).sum()
    solved = statistics.squared_error(weight - MaskedCG()(weight, mask, statistics)).sum()
    assert solved < sweep
