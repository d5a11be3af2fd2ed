from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.patterns import NM, Unstructured
from symprune_lightning.functional.refiners import DSnoT, R2DSnoT
from symprune_lightning.functional.scores import RIA, Wanda
from symprune_lightning.functional.statistics import Moments, Statistics
from tests.functional.examples import example

REFINERS = [
    DSnoT(),
    DSnoT(same_sign=True, p_var=0.5),
    DSnoT(reference=True, cycles=3),
    R2DSnoT(),
    R2DSnoT(grow_relative=True, prune_relative=False, gamma1=0.1, p=1.0),
    R2DSnoT(guard="mean", threshold=0.0),
    R2DSnoT(guard="gram", grow_relative=True),
    R2DSnoT(cycles=0),
]


def mean_error(weight, mask, statistics):
    return (weight.double().masked_fill(mask, 0) @ statistics.input.mean).abs()


@pytest.mark.parametrize("refiner", REFINERS)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 30),
    sparsity=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_every_row_keeps_its_count(refiner, rows, columns, sparsity, dtype, seed):
    weight, mask, statistics = example(rows, columns, sparsity, seed, dtype)
    before = mask.clone()
    refined = refiner(weight, mask, statistics)
    assert refined.dtype == torch.bool
    assert torch.equal(refined.sum(1), mask.sum(1))
    assert torch.equal(mask, before), "the mask that came in is not written to"


@pytest.mark.parametrize("refiner", REFINERS)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 6),
    nm=st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_every_group_keeps_its_count(refiner, rows, groups, nm, dtype, seed):
    n, m = nm
    weight, mask, statistics = example(rows, groups * m, seed=seed, dtype=dtype, pattern=NM(n, m))
    refined = refiner(weight, mask, statistics, m)
    assert (refined.reshape(-1, m).sum(1) == n).all()


def test_refiners_of_groups_do_something():
    weight, mask, statistics = example(32, 64, odd=False, pattern=NM(2, 4))
    for refiner in (DSnoT(), DSnoT(reference=True), R2DSnoT(), R2DSnoT(guard="gram")):
        assert (refiner(weight, mask, statistics, 4) != mask).any(), refiner


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("refiner", [DSnoT(), R2DSnoT(), R2DSnoT(gamma1=0.0, gamma2=0.0)])
def test_constant_channels_and_weights_that_are_zero(refiner, window):
    """The key of a zero weight in a channel without variance is 0, and hides no other column."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[torch.rand(64, 64) < 0.3] = 0
    x = torch.randn(50, 64)
    x[:, ::3] = 1000.0
    statistics = Statistics(input=Moments.of(x))
    pattern = NM(2, 4) if window else Unstructured(0.5)
    mask = pattern.mask(Wanda()(weight, statistics))
    refined = refiner(weight, mask, statistics, window)
    groups = window or 64
    kept = [x.view(64, -1, groups).sum(2) for x in (mask, refined)]
    assert torch.equal(*kept)
    assert not torch.equal(mask, refined)


@given(seed=st.integers(0, 999), window=st.sampled_from([None, 4, 10]), relative=st.booleans())
def test_gram_guard_never_raises_the_exact_error_of_any_row(seed, window, relative):
    pattern = None if window is None else NM(window // 2, window)
    weight, mask, statistics = example(8, 20, seed=seed, dtype=torch.float64, pattern=pattern)
    refiner = R2DSnoT(guard="gram", threshold=0.0, prune_relative=relative)
    refined = refiner(weight, mask, statistics, window)
    before = statistics.squared_error(weight.masked_fill(mask, 0))
    after = statistics.squared_error(weight.masked_fill(refined, 0))
    assert (after <= before * (1 + 1e-9)).all()


@given(seed=st.integers(0, 999))
def test_zero_weights_are_never_grown(seed):
    weight, _, statistics = example(seed=seed)
    weight[:, ::3] = 0
    mask = Unstructured(0.6).mask(Wanda()(weight, statistics)) & (weight != 0)
    for refiner in (DSnoT(), R2DSnoT()):
        assert not (refiner(weight, mask, statistics) & (weight == 0)).any()


@given(seed=st.integers(0, 999))
def test_mean_guard_never_raises_the_mean_error(seed):
    weight, mask, statistics = example(seed=seed)
    refined = R2DSnoT(guard="mean", threshold=0.0)(weight, mask, statistics)
    before = mean_error(weight, mask, statistics)
    assert (mean_error(weight, refined, statistics) <= before * (1 + 1e-5) + 1e-6).all()


def test_refining_does_something_and_lowers_the_mean_error():
    weight, mask, statistics = example(64, 64, odd=False)
    for refiner in (DSnoT(same_sign=True), R2DSnoT(same_sign=True), R2DSnoT(guard="mean")):
        refined = refiner(weight, mask, statistics)
        assert (refined != mask).any()
        after = mean_error(weight, refined, statistics).sum()
        assert after < 0.5 * mean_error(weight, mask, statistics).sum()


@given(seed=st.integers(0, 999), cycles=st.integers(0, 20), same_sign=st.booleans())
def test_r2dsnot_without_its_own_terms_is_dsnot(seed, cycles, same_sign):
    weight, mask, statistics = example(seed=seed)
    plain = R2DSnoT(cycles=cycles, same_sign=same_sign, alpha=1.0, gamma2=0.0, prune_relative=False)
    dsnot = DSnoT(cycles=cycles, same_sign=same_sign)
    assert torch.equal(plain(weight, mask, statistics), dsnot(weight, mask, statistics))


@given(seed=st.integers(0, 999))
def test_rows_do_not_depend_on_each_other(seed):
    weight, mask, statistics = example(8, seed=seed)
    for refiner in (DSnoT(), R2DSnoT(prune_relative=False)):
        whole = refiner(weight, mask, statistics)
        single = [refiner(weight[i : i + 1], mask[i : i + 1], statistics) for i in range(8)]
        assert torch.equal(whole, torch.cat(single))


def naive_dsnot(weight, mask, statistics, cycles, threshold):
    """Algorithm 1 as one would write it by hand: a loop over rows, lists and swaps."""
    mean, norm, variance = (
        x.float() for x in (statistics.input.mean, statistics.input.norm, statistics.input.variance)
    )
    mask = mask.clone()
    for q in range(len(weight)):
        contribution = weight[q] * mean
        error = contribution[~mask[q]].sum()
        growable = [r for r in range(len(mean)) if not mask[q, r]]
        prunable = [r for r in range(len(mean)) if mask[q, r]]
        for _ in range(cycles):
            sign = 1 if error > 0 else -1
            grows = [r for r in growable if sign * contribution[r] > 0]
            prunes = [r for r in prunable if sign * contribution[r] < 0]
            if abs(error) <= threshold or not grows or not prunes:
                break
            grow = max(grows, key=lambda r: float((contribution[r] / variance[r]).abs()))
            prune = min(prunes, key=lambda r: float(weight[q, r].abs() * norm[r]))
            growable.remove(grow)
            prunable.remove(prune)
            mask[q, grow], mask[q, prune] = True, False
            error = error + contribution[prune] - contribution[grow]
    return mask


@given(seed=st.integers(0, 200), cycles=st.integers(1, 12), sparsity=st.sampled_from([0.3, 0.7]))
def test_dsnot_equals_the_algorithm_spelled_out(seed, cycles, sparsity):
    weight, mask, statistics = example(4, 16, sparsity, seed)
    refined = DSnoT(cycles=cycles, threshold=1e-3)(weight, mask, statistics)
    assert torch.equal(refined, naive_dsnot(weight, mask, statistics, cycles, 1e-3))


def test_pruning_rule_of_r2dsnot_is_ria():
    """One swap, prune_relative, no penalty: what goes is the eligible weight of lowest RIA."""
    weight, mask, statistics = example(16, 32)
    refined = R2DSnoT(cycles=1, gamma2=0.0, threshold=0.0)(weight, mask, statistics)
    contribution = weight * statistics.input.mean.float()
    sign = contribution.masked_fill(mask, 0).sum(1, keepdim=True).sign()
    score = RIA()(weight, statistics).masked_fill(~(mask & (sign * contribution < 0)), torch.inf)
    for row in (refined != mask).any(1).nonzero().flatten().tolist():
        assert (mask & ~refined)[row].nonzero().item() == score[row].argmin()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"guard": "exact"}, "choose None, 'mean' or 'gram'"), ({"gamma2": -1.0}, "at least 0")],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        R2DSnoT(**options)
