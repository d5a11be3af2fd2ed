from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional import update as update_file
from symprune_lightning.functional.patterns import NM, Unstructured
from symprune_lightning.functional.statistics import Statistics
from symprune_lightning.functional.update import OBSUpdate, SparseGPT, inverse_factor
from tests.functional.refiners.examples import example


def correlated(rows=8, columns=24, seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator)
    x = (torch.randn(tokens, columns, generator=generator) @ mix).double()
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Statistics(layer="a", gram=x.T @ x / tokens)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_pruned_weights_are_zero_and_the_mask_stays(rows, columns, dtype, seed):
    weight, mask, statistics = example(rows, columns, seed=seed, dtype=dtype)
    before = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damping may have to be raised
        updated, kept = OBSUpdate()(weight, mask, statistics, Unstructured(0.5))
    assert torch.equal(weight, before)
    assert torch.equal(kept, mask & (weight != 0))
    assert (updated[~mask] == 0).all()
    assert updated.isfinite().all()
    assert updated.dtype == dtype


def test_update_lowers_the_error_far():
    weight, statistics = correlated()
    mask = Unstructured(0.5).mask(weight.abs())
    updated, _ = OBSUpdate()(weight, mask, statistics, Unstructured(0.5))
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
    updated, _ = OBSUpdate()(weight.double(), mask, statistics, Unstructured(0.5))
    torch.testing.assert_close(updated, expected.masked_fill(~mask, 0))


@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize("method", [OBSUpdate(), SparseGPT()])
def test_blocks_do_not_change_the_sweep(block, method, monkeypatch):
    weight, statistics = correlated()
    pattern = NM(2, 4)
    mask = pattern.mask(weight.abs())
    expected, kept = method(weight.double(), mask, statistics, pattern)
    monkeypatch.setattr(update_file, "BLOCK", block)
    updated, again = method(weight.double(), mask, statistics, pattern)
    torch.testing.assert_close(updated, expected)
    assert torch.equal(kept, again)


@pytest.mark.parametrize("columns", [64, 200, 300])
@pytest.mark.parametrize("group", ["output", "layer", "input"])
def test_sparsegpt_meets_the_budget(columns, group):
    weight, statistics = correlated(rows=10, columns=columns, tokens=600)
    pattern = Unstructured(0.6, group)
    kept = torch.ones_like(weight, dtype=torch.bool)
    updated, mask = SparseGPT()(weight, kept, statistics, pattern)
    assert torch.equal(updated != 0, mask)
    grouped = pattern.groups(~mask)
    assert (grouped.sum(1) == pattern.pruned(grouped.shape[1])).all()


def test_sparsegpt_keeps_n_of_m():
    weight, statistics = correlated()
    _, mask = SparseGPT()(weight, torch.ones_like(weight).bool(), statistics, NM(2, 4))
    assert (mask.reshape(-1, 4).sum(1) == 2).all()


def test_sparsegpt_beats_a_mask_without_update():
    weight, statistics = correlated(rows=32, columns=300, tokens=2000)
    pattern = Unstructured(0.5, "layer")
    updated, _ = SparseGPT()(weight, torch.ones_like(weight).bool(), statistics, pattern)
    masked = weight.masked_fill(pattern.mask(weight.abs()), 0)
    errors = [statistics.squared_error(x).sum() for x in (weight - updated, masked)]
    assert errors[0] < 0.9 * errors[1]


def test_damping_is_raised_and_said():
    vector = torch.ones(6, 1).double()
    statistics = Statistics(layer="model.q", gram=vector @ vector.T)
    with pytest.warns(UserWarning, match=r"layer model.q: .* can't be factored with damping 0;"):
        factor = inverse_factor(statistics, 0.0, torch.float32)
    assert factor.isfinite().all()


def test_gram_matrix_that_is_not_finite():
    statistics = Statistics(layer="model.q", gram=torch.full((3, 3), torch.nan).double())
    with pytest.raises(ValueError, match=r"layer model.q can't be factored at all"):
        inverse_factor(statistics, 0.01, torch.float32)


def test_zero_weights_stay_zero():
    weight, statistics = correlated()
    weight[:, 3] = 0
    mask = torch.ones_like(weight).bool()
    mask[:, 0] = False
    updated, kept = OBSUpdate()(weight, mask, statistics, Unstructured(0.5))
    assert (updated[:, 3] == 0).all()
    assert not kept[:, 3].any()
