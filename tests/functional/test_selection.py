"""The k-th lowest value of each row."""

from __future__ import annotations

import pytest
import torch

from symprune_lightning.functional.selection import VALUES_PER_THREAD, kth_lowest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33), (1500, 700), (3, VALUES_PER_THREAD)])
@pytest.mark.parametrize("kind", ["distinct", "tied", "infinite", "strided"])
def test_values_are_those_of_a_sort(dtype, shape, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if kind == "tied":
        x = x.round()
    if kind == "infinite":
        x[:, ::2] = torch.inf
    if kind == "strided":
        x = x.T.contiguous().T
    x = x.to(dtype)
    before = x.clone()
    for k in {1, (shape[1] + 1) // 2, shape[1]}:
        expected = x.sort(1).values[:, k - 1 : k]
        assert torch.equal(kth_lowest(x, k), expected)
    assert torch.equal(x, before)


def test_scores_that_require_a_gradient():
    x = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    assert kth_lowest(x, 2).item() == 2
