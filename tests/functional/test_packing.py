"""Masks as bits."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.packing import pack, unpack


@given(rows=st.integers(0, 5), columns=st.integers(1, 40), data=st.data())
def test_bits_survive_packing(rows, columns, data):
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = torch.tensor(bits, dtype=torch.bool).view(rows, columns)
    packed = pack(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack(packed, columns), mask)
