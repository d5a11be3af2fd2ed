from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.patterns import NM
from symprune_lightning.functional.refiners import ExactSwap, exact
from symprune_lightning.functional.refiners.shortlist import lowest_of_groups
from symprune_lightning.functional.refiners.swaps import lowest
from symprune_lightning.functional.statistics import Statistics
from tests.functional.examples import example

WINDOWS = st.sampled_from([None, 2, 4, 5, 10])


def patterned(window):
    return None if window is None else NM(window // 2, window)


def error(weight, mask, statistics):
    return statistics.squared_error(weight.masked_fill(mask, 0))


def best_pair(weight, mask, gram, window):
    """The largest fall of one row's error by any pair, by trying all."""
    columns = len(weight)

    def cost(m):
        removed = weight.masked_fill(m, 0)
        return float(removed @ gram @ removed)

    falls = [0.0]
    for g in range(columns):
        for p in range(columns):
            if mask[p] and not mask[g] and (window is None or g // window == p // window):
                swapped = mask.clone()
                swapped[g], swapped[p] = True, False
                falls.append(cost(mask) - cost(swapped))
    return max(falls)


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    window=WINDOWS,
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_counts_are_kept_and_no_row_gets_worse(rows, groups, window, sparsity, dtype, seed):
    columns = groups * (window or 7)
    pattern = patterned(window)
    weight, mask, statistics = example(rows, columns, sparsity, seed, dtype, pattern=pattern)
    before = mask.clone()
    refined = ExactSwap()(weight, mask, statistics, window)
    assert torch.equal(mask, before)
    size = window or columns
    assert torch.equal(refined.reshape(-1, size).sum(1), mask.reshape(-1, size).sum(1))
    wide = weight.double()
    slack = 1e-4 if dtype == torch.float32 else 1e-9
    worst = error(wide, mask, statistics) * (1 + slack) + slack * wide.square().sum(1)
    assert (error(wide, refined, statistics) <= worst).all()


@given(seed=st.integers(0, 300), window=WINDOWS)
def test_ends_where_no_pair_helps(seed, window):
    """With all weights on the shortlist the end is a local optimum over all pairs."""
    weight, mask, statistics = example(
        3, 20, seed=seed, dtype=torch.float64, odd=False, pattern=patterned(window)
    )
    refined = ExactSwap(cycles=1000)(weight, mask, statistics, window)
    for w, m, e in zip(weight, refined, error(weight, refined, statistics), strict=True):
        assert best_pair(w, m, statistics.gram, window) <= 1e-5 * float(e) + 1e-12


@given(seed=st.integers(0, 300), window=WINDOWS)
def test_first_swap_is_the_best_of_all_pairs(seed, window):
    weight, mask, statistics = example(
        4, 20, seed=seed, dtype=torch.float64, odd=False, pattern=patterned(window)
    )
    refined = ExactSwap(cycles=1)(weight, mask, statistics, window)
    fall = error(weight, mask, statistics) - error(weight, refined, statistics)
    pairs = zip(weight, mask, strict=True)
    best = torch.tensor(
        [best_pair(w, m, statistics.gram, window) for w, m in pairs], dtype=torch.float64
    )
    torch.testing.assert_close(fall, best, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 99), cycles=st.integers(0, 20), window=WINDOWS)
def test_number_of_swaps_is_limited(seed, cycles, window):
    weight, mask, statistics = example(8, 40, seed=seed, pattern=patterned(window))
    refined = ExactSwap(cycles=cycles)(weight, mask, statistics, window)
    assert ((refined & ~mask).sum(1) <= cycles).all()


def test_error_falls_far():
    generator = torch.Generator().manual_seed(0)
    weight, mask, statistics = example(32, 64, odd=False)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    statistics = replace(statistics, gram=(x.T @ x / 500).double())
    refined = ExactSwap()(weight, mask, statistics)
    after, before = (error(weight, m, statistics).sum() for m in (refined, mask))
    assert after < 0.7 * before


def test_chunks_do_not_matter(monkeypatch):
    weight, mask, statistics = example(50, 40)
    masks = []
    for chunk in (2**17, 200, 1):
        monkeypatch.setattr(exact, "CHUNK", chunk)
        masks.append(ExactSwap()(weight, mask, statistics))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_zero_weights_are_never_grown():
    weight, _, statistics = example(odd=False)
    weight[:, ::3] = 0
    mask = (torch.rand(weight.shape) > 0.5) & (weight != 0)
    refined = ExactSwap()(weight, mask, statistics)
    assert not (refined & (weight == 0)).any()


def test_needs_the_gram_matrix():
    weight, mask, _ = example()
    with pytest.raises(ValueError, match="needs the statistic 'gram'"):
        ExactSwap()(weight, mask, Statistics())


@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 7, 31, 64, 256, 512]),
    count=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_lowest_equals_a_sort(rows, columns, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)]).double()
    count = min(count, columns)
    values, indices = lowest(x, count)
    assert torch.equal(values, x.sort(1).values[:, :count])
    assert torch.equal(x.gather(1, indices), values)


@given(
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 7, 64, 128, 256, 264, 576]),
    count=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_lowest_of_groups(rows, columns, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)]).double()
    count = min(count, columns)
    values, indices = lowest_of_groups(x, count)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row.tolist())) == count for row in indices)
    assert torch.equal(values[:, 0], x.amin(1))
    assert torch.equal(values, values.sort(1).values)


@given(seed=st.integers(0, 50), window=st.sampled_from([None, 4]), split=st.integers(1, 11))
def test_rows_do_not_depend_on_each_other(seed, window, split):
    """Ranks refine the rows of their shard, and get the masks of a single process."""
    weight, mask, statistics = example(
        12, 256, seed=seed, dtype=torch.float64, odd=False, pattern=patterned(window)
    )
    together = ExactSwap()(weight, mask, statistics, window)
    parts = [
        ExactSwap()(w, m, statistics, window)
        for w, m in zip(weight.split(split), mask.split(split), strict=True)
    ]
    assert torch.equal(torch.cat(parts), together)
