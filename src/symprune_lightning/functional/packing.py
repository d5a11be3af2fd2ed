"""Masks as bits: eight columns to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Eight columns of bools to a byte, the first in the lowest bit.

    Args:
        mask: Bool, ``(rows, columns)``.

    Returns:
        uint8, ``(rows, ceil(columns / 8))``.

    Examples:
        >>> pack(torch.tensor([[True, False, True]])).tolist()
        [[5]]
    """
    rows, columns = mask.shape
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8))
    shifted: Tensor = bits.view(rows, bits.shape[1] // 8, 8) << _shifts(mask.device)
    return shifted.sum(2, dtype=torch.uint8)


def unpack(data: Tensor, columns: int) -> Tensor:
    """The mask of that many columns that was packed to ``data``.

    Examples:
        >>> unpack(torch.tensor([[5]], dtype=torch.uint8), 3).tolist()
        [[True, False, True]]
    """
    bits = (data[:, :, None] >> _shifts(data.device)) & 1
    return bits.flatten(1)[:, :columns].bool()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
