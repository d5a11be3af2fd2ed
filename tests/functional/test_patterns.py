from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.patterns import (
    NM,
    Unstructured,
    resolve_pattern,
)

GROUPS = ("output", "input", "layer")


def sorted_reference(score, pattern):
    """The mask by a stable ascending sort: the rule on ties, literally."""
    grouped = pattern.groups(score)
    order = grouped.argsort(dim=1, stable=True)
    kept = torch.ones_like(grouped, dtype=torch.bool)
    kept.scatter_(1, order[:, : pattern.num_pruned(grouped.shape[1])], False)
    return pattern.ungroup(kept, score.shape)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    values=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.6, 0.7, 0.99]),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_unstructured_equals_a_stable_sort(rows, columns, values, sparsity, group, dtype, seed):
    # few distinct values, so that there are ties of every kind
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, values, (rows, columns), generator=generator).to(dtype)
    pattern = Unstructured(sparsity, group)
    mask = pattern.mask(score)
    assert torch.equal(mask, sorted_reference(score, pattern))
    size = {"output": columns, "input": rows, "layer": rows * columns}[group]
    dimension = {"output": 1, "input": 0, "layer": (0, 1)}[group]
    assert ((~mask).sum(dimension) == math.floor(size * sparsity + 1e-9)).all()


@given(
    rows=st.integers(1, 8),
    groups=st.integers(1, 5),
    m=st.integers(2, 8),
    data=st.data(),
    seed=st.integers(0, 999),
)
def test_nm_equals_a_stable_sort(rows, groups, m, data, seed):
    n = data.draw(st.integers(1, m - 1))
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (rows, groups * m), generator=generator).float()
    pattern = NM(n, m)
    mask = pattern.mask(score)
    assert torch.equal(mask, sorted_reference(score, pattern))
    assert (mask.reshape(-1, m).sum(1) == n).all()


def test_infinite_scores_are_ordered():
    score = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    assert Unstructured(0.5).mask(score).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, math.nan])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"fraction of weights to prune.*for fifty percent"):
        Unstructured(sparsity)


def test_unknown_group():
    with pytest.raises(ValueError, match="choose one of output, input, layer, block, model"):
        Unstructured(0.5, "row")  # type: ignore[arg-type]


def test_pattern_that_does_not_divide():
    with pytest.raises(ValueError, match="2:4 does not divide 6 inputs"):
        NM(2, 4).mask(torch.ones(2, 6))


@pytest.mark.parametrize("pattern", ["2-4", "two:four", "2:4:8", ""])
def test_invalid_pattern_string(pattern):
    with pytest.raises(ValueError, match="write it as 'N:M'"):
        resolve_pattern(pattern)


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "5:4"])
def test_pattern_that_prunes_all_or_nothing(pattern):
    with pytest.raises(ValueError, match="0 < n < m"):
        resolve_pattern(pattern)


def test_pattern_replaces_sparsity_and_group():
    assert resolve_pattern("2:4", sparsity=0.9, group="layer") == NM(2, 4)
    assert resolve_pattern(NM(1, 4)) == NM(1, 4)
    assert resolve_pattern(None, sparsity=0.3, group="input") == Unstructured(0.3, "input")


def test_swap_windows():
    assert Unstructured(0.5).swap_window() is None
    assert Unstructured(0.5, "layer").swap_window() is None
    assert NM(2, 4).swap_window() == 4
    with pytest.raises(ValueError, match="breaks the budget of group 'input'"):
        Unstructured(0.5, "input").swap_window()
