from __future__ import annotations

import pytest
import torch

from symprune_lightning.functional import obs
from symprune_lightning.functional.patterns import NM, Unstructured
from symprune_lightning.functional.solvers import ADMM, SparseGPT
from symprune_lightning.functional.statistics import Statistics
from symprune_lightning.functional.update import MaskedCG, OBSUpdate
from tests.functional.examples import correlated


@pytest.mark.parametrize("block", [1, 5, 8, 128])
def test_blocks_do_not_change_the_sweep(block, monkeypatch):
    weight, statistics = correlated()
    expected, mask = SparseGPT()(weight.double(), statistics, NM(2, 4))
    monkeypatch.setattr(obs, "BLOCK", block)
    updated, again = SparseGPT()(weight.double(), statistics, NM(2, 4))
    torch.testing.assert_close(updated, expected)
    assert torch.equal(mask, again)


@pytest.mark.parametrize("columns", [64, 200, 300])
@pytest.mark.parametrize("group", ["output", "layer", "input"])
def test_sparsegpt_meets_the_budget(columns, group):
    weight, statistics = correlated(rows=10, columns=columns, tokens=600)
    pattern = Unstructured(0.6, group)
    updated, mask = SparseGPT()(weight, statistics, pattern)
    assert torch.equal(updated != 0, mask)
    grouped = pattern.groups(~mask)
    assert (grouped.sum(1) == pattern.num_pruned(grouped.shape[1])).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), NM(2, 4)], ids=repr)
def test_weights_are_those_of_the_update_with_the_same_mask(pattern):
    weight, statistics = correlated(rows=10, columns=300, tokens=600)
    updated, mask = SparseGPT()(weight.double(), statistics, pattern)
    torch.testing.assert_close(updated, OBSUpdate()(weight.double(), mask, statistics))


def test_sparsegpt_beats_a_mask_without_update():
    weight, statistics = correlated(rows=32, columns=300, tokens=2000)
    pattern = Unstructured(0.5, "layer")
    updated, _ = SparseGPT()(weight, statistics, pattern)
    masked = weight.masked_fill(pattern.mask(weight.abs()), 0)
    errors = [statistics.squared_error(x).sum() for x in (weight - updated, masked)]
    assert errors[0] < 0.9 * errors[1]


def test_zero_weights_stay_zero_and_count_as_pruned():
    weight, statistics = correlated()
    weight[:, 3] = 0
    updated, mask = SparseGPT()(weight, statistics, Unstructured(0.5))
    assert (updated[:, 3] == 0).all()
    assert not mask[:, 3].any()
    assert (mask.sum(1) == 12).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)])
def test_admm_lowers_the_error_of_wandas_mask_in_every_row(pattern):
    weight, statistics = correlated()
    wanda = pattern.mask(weight.abs() * statistics.gram_matrix.diagonal().sqrt().to(weight.dtype))
    solved, mask = ADMM()(weight, statistics, pattern)
    assert torch.equal(mask.sum(1), wanda.sum(1))
    assert (solved[~mask] == 0).all()
    before = statistics.squared_error(weight * ~wanda)
    after = statistics.squared_error(weight - solved)
    assert (after <= before).all()
    fixed = statistics.squared_error(weight - MaskedCG(100)(weight, wanda, statistics))
    assert after.sum() < fixed.sum(), "better than the best weights for Wanda's mask"


def test_admm_with_a_singular_gram_matrix():
    x = torch.randn(4, 32, dtype=torch.float64)
    x[:, 5] = 0  # an input that is never active
    statistics = Statistics(gram=x.T @ x / 4)
    weight = torch.randn(6, 32)
    solved, mask = ADMM()(weight, statistics, Unstructured(0.5))
    assert solved.isfinite().all()
    assert (mask.sum(1) == 16).all()
