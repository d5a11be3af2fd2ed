"""Bit-packed masks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.packing import PackedMasks, pack, unpack


@given(rows=st.integers(0, 5), columns=st.integers(1, 40), data=st.data())
def test_bits_survive_packing(rows, columns, data):
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = torch.tensor(bits, dtype=torch.bool).view(rows, columns)
    packed = pack(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack(packed, columns), mask)
    assert torch.equal(PackedMasks({"a": mask})["a"], mask)


@given(rows=st.integers(1, 9), columns=st.integers(1, 40))
def test_transposed_masks(rows, columns):
    """The masks of layers that are stored transposed."""
    mask = torch.rand(columns, rows, generator=torch.Generator().manual_seed(rows)) < 0.5
    packed = pack(mask.T)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack(mask.T.contiguous()))
    assert torch.equal(unpack(packed.T.contiguous().T, columns=columns), mask.T)


def example():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) < 0.5
        for name, shape in {"b": (3, 8), "a": (5, 13), "c": (2, 1)}.items()
    }


def test_is_a_mapping_of_masks():
    masks = example()
    packed = PackedMasks(masks)
    assert list(packed) == ["b", "a", "c"]
    assert len(packed) == 3
    assert "a" in packed
    assert "d" not in packed
    for name, mask in packed.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, masks[name])
    with pytest.raises(KeyError):
        packed["d"]
    assert repr(PackedMasks({"b": masks["b"]})) == "PackedMasks({'b': (3, 8)})"


def test_masks_are_stored_as_bits():
    mask = torch.ones(100, 80, dtype=torch.bool)
    packed = PackedMasks({"a": mask})
    bits, columns = packed.packed("a")
    assert (bits.dtype, tuple(bits.shape), columns) == (torch.uint8, (100, 10), 80)
    mask[:] = False
    packed["a"][:] = False
    assert packed["a"].all()


def test_adding():
    masks = example()
    packed = PackedMasks()
    packed.add("a", masks["b"])
    packed.add("a", masks["a"])
    packed.add_packed("b", *PackedMasks(masks).packed("b"))
    packed.add_packed("c", pack(masks["c"]), 1)
    assert packed == masks


def test_equality():
    masks = example()
    packed = PackedMasks(masks)
    assert packed == masks
    assert masks == packed
    assert packed == PackedMasks(dict(reversed(masks.items())))
    assert PackedMasks() == {}
    assert packed != {}
    assert packed != {name: masks[name] for name in "ab"}
    assert packed != masks | {"d": masks["c"]}
    assert packed != "masks"
    changed = masks["a"].clone()
    changed[4, 12] ^= True
    for other in (changed, masks["a"][:, :12], masks["a"].int(), None):
        assert packed != masks | {"a": other}
    assert packed != PackedMasks(masks | {"a": changed})
    # the same bytes, with another number of columns
    narrow, wide = torch.ones(1, 3).bool(), torch.tensor([[True, True, True, False]])
    assert torch.equal(pack(narrow), pack(wide))
    assert PackedMasks({"a": narrow}) != PackedMasks({"a": wide})
    with pytest.raises(TypeError, match="unhashable"):
        hash(packed)


def test_copies():
    packed = PackedMasks(example())
    assert copy.deepcopy(packed) == packed
    assert pickle.loads(pickle.dumps(packed)) == packed


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3).bool()])
def test_what_is_no_mask(mask):
    with pytest.raises(ValueError, match="mask of layer fc must be a bool matrix"):
        PackedMasks().add("fc", mask)


@pytest.mark.parametrize(
    ("bits", "columns", "message"),
    [
        (torch.zeros(2, 1), 8, "must be uint8"),
        (torch.zeros(2, 1, dtype=torch.uint8), 9, r"of shape \(rows, 2\) for 9 columns"),
        (torch.full((2, 1), 8, dtype=torch.uint8), 3, "set beyond its 3 columns"),
    ],
)
def test_bits_of_no_mask(bits, columns, message):
    with pytest.raises(ValueError, match=message):
        PackedMasks().add_packed("fc", bits, columns)
