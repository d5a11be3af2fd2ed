"""Arithmetic with masks, chunks of rows and dtypes, in the ways that are fast on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WEIGHTS_AT_ONCE = 2**20
"""Number of values that `row_chunks` yields together on a CPU: they stay in its cache."""

WEIGHTS_AT_ONCE_ON_GPU = 2**26
"""The same on other devices, where it only bounds memory, and each chunk launches kernels."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32 if it is in half precision, otherwise unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_number(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 where a mask is True and 0 elsewhere.

    Examples:
        >>> as_number(torch.tensor([True, False]), torch.float32)
        tensor([1., 0.])
    """
    # of bytes: the conversion of bools takes eight times as long on a CPU
    return mask.view(torch.uint8).to(dtype)


def zero_(x: Tensor, pruned: Tensor) -> None:
    """Set values to zero in place where a mask is True, also those that are NaN or infinite.

    Args:
        x: Floating point, any shape.
        pruned: Bool, same shape.

    Examples:
        >>> x = torch.tensor([-1.0, torch.inf, 2.0])
        >>> zero_(x, torch.tensor([True, True, False]))
        >>> x
        tensor([0., 0., 2.])
    """
    # A product of integers with the same bits: `masked_fill_` takes twenty times as long on a CPU,
    # and a product of floats would be −0 for negative values and NaN for infinite ones.
    x.view(_BITS[x.element_size()]).mul_((~pruned).view(torch.uint8))


def row_chunks(x: Tensor) -> Iterator[Tensor]:
    """Yield views of some rows at a time: with at most 2²⁰ values, 2²⁶ on a GPU, or one row.

    For arithmetic with temporary tensors on large layers: on a CPU, those of this size stay in the
    cache, and larger ones take ten times as long per value.

    Args:
        x: ``(rows, columns)``; one chunk if it has no rows.

    Examples:
        >>> [len(chunk) for chunk in row_chunks(torch.zeros(3, 2**19))]
        [2, 1]
    """
    at_once = WEIGHTS_AT_ONCE if x.device.type == "cpu" else WEIGHTS_AT_ONCE_ON_GPU
    size = max(1, at_once // max(1, x.shape[1]))
    for start in range(0, max(1, len(x)), size):
        yield x[start : start + size]
