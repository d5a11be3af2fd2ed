from __future__ import annotations

import torch

from symprune_lightning.engine.forward.sums import (
    GramMatrix,
    InputMoments,
    SequenceVariance,
)


def test_moments_add_up():
    sums = InputMoments(3)
    x = torch.randn(2, 5, 3)
    sums.update(x[:1])
    sums.update(x[1:])
    torch.testing.assert_close(sums.value.mean, x.double().flatten(0, 1).mean(0))
    assert sums.value.tokens == 10


def test_merging_is_addition():
    one, other, both = InputMoments(3), InputMoments(3), InputMoments(3)
    x = torch.randn(2, 5, 3)
    one.update(x[:1])
    other.update(x[1:])
    both.update(x[:1])
    both.update(x[1:])
    assert all(torch.equal((one + other).totals[n], both.totals[n]) for n in both.totals)


def test_one_channel_stays_a_vector():
    for sums in (InputMoments(1), SequenceVariance(1)):
        sums.update(torch.randn(1, 4, 1))
    assert sums.value.shape == (1,)


def test_sequence_variance_is_token_weighted():
    sums = SequenceVariance(3)
    short, long = torch.randn(1, 2, 3).double(), torch.randn(3, 6, 3).double()
    sums.update(short)
    sums.update(long)
    inside = short.var(1, correction=0).sum(0) * 2 + long.var(1, correction=0).sum(0) * 6
    torch.testing.assert_close(sums.value, inside / 20)


def test_gram_matrix():
    sums, x = GramMatrix(3), torch.randn(2, 5, 3)
    sums.update(x[:1])
    sums.update(x[1:])
    flat = x.double().flatten(0, 1)
    torch.testing.assert_close(sums.value, flat.T @ flat / 10, rtol=1e-5, atol=1e-6)
