"""Arithmetic with bool masks."""

from __future__ import annotations

import pytest
import torch

from symprune_lightning.functional.tensors import as_number, zero_

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_number(dtype):
    mask = torch.tensor([[True, False], [False, True]])
    number = as_number(mask.T, dtype)
    assert number.dtype == dtype
    assert torch.equal(number, mask.T.to(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_zero_keeps_bits_and_writes_positive_zeros(dtype):
    values = torch.tensor([-1.5, torch.nan, -0.0, 3.0, -2.0, torch.nan]).to(dtype)
    pruned = torch.tensor([True, True, True, False, False, False])
    expected = values.view(torch.uint8).clone()
    expected.view(6, -1)[:3] = 0
    zero_(values, pruned)
    assert torch.equal(values.view(torch.uint8), expected)


def test_zero_in_a_transposed_view():
    weight = torch.randn(5, 3)
    expected = weight.clone()
    pruned = torch.rand(3, 5) < 0.5
    zero_(weight.T, pruned)
    assert torch.equal(weight, expected.masked_fill(pruned.T, 0))
