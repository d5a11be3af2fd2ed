from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.statistics import Moments, Statistics


@given(
    tokens=st.integers(1, 40),
    channels=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_moments_are_those_of_torch(tokens, channels, dtype, seed):
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
    moments = Moments.of(x)
    exact = x.double()
    torch.testing.assert_close(moments.mean, exact.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.variance, exact.var(0, correction=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.norm, exact.square().mean(0).sqrt(), atol=1e-5, rtol=1e-5)


@given(cuts=st.lists(st.integers(1, 19), max_size=4), seed=st.integers(0, 99))
def test_moments_do_not_depend_on_how_tokens_are_batched(cuts, seed):
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    parts = [p for p in torch.tensor_split(x, sorted(cuts)) if len(p)]
    merged = sum((Moments.of(p) for p in parts[1:]), Moments.of(parts[0]))
    whole = Moments.of(x)
    torch.testing.assert_close(merged.total, whole.total)
    torch.testing.assert_close(merged.total_square, whole.total_square)
    assert merged.tokens == whole.tokens == 20


def test_constant_channel_has_no_negative_variance():
    x = torch.full((1000, 1), 0.1)
    assert (Moments.of(x).variance >= 0).all()


def test_leading_dimensions_are_tokens():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(Moments.of(x).total, Moments.of(x.reshape(24, 5)).total)


def test_squared_error_is_exact_for_independent_channels():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 4, generator=generator) * torch.tensor([1.0, 2, 3, 4]) + 1
    delta = torch.randn(3, 4, generator=generator)
    estimate = Statistics(input=Moments.of(x)).squared_error(delta)
    torch.testing.assert_close(estimate, (x @ delta.T).square().mean(0), rtol=0.02, atol=0)


def test_missing_input():
    with pytest.raises(ValueError, match="needs the statistic 'input'"):
        _ = Statistics().input_moments


def test_squared_error_is_exact_with_the_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    delta = torch.randn(3, 4, generator=generator)
    statistics = Statistics(gram=(x.T @ x / 30).double())
    torch.testing.assert_close(
        statistics.squared_error(delta), (x @ delta.T).square().mean(0), rtol=1e-4, atol=1e-5
    )
