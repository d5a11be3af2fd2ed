"""Bit-packed masks: eight columns per byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask into bytes of eight columns, the first column in the lowest bit.

    Args:
        mask: Bool, ``(rows, columns)``.

    Returns:
        uint8, ``(rows, ceil(columns / 8))``; unused bits of the last byte are 0.

    Examples:
        >>> pack(torch.tensor([[True, False, True]])).tolist()
        [[5]]
    """
    if mask.device.type == "cpu":  # a twentieth of the time
        return torch.from_numpy(np.packbits(mask.contiguous().numpy(), axis=1, bitorder="little"))
    rows, columns = mask.shape
    bits = torch.nn.functional.pad(mask.view(torch.uint8), (0, -columns % 8))
    shifted: Tensor = bits.view(rows, bits.shape[1] // 8, 8) << _shifts(mask.device)
    return shifted.sum(2, dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """Unpack what `pack` returned.

    Args:
        bits: uint8, ``(rows, ceil(columns / 8))``.
        columns: Number of columns of the mask.

    Returns:
        Bool mask, ``(rows, columns)``.

    Examples:
        >>> unpack(torch.tensor([[5]], dtype=torch.uint8), 3).tolist()
        [[True, False, True]]
    """
    if bits.device.type == "cpu":
        unpacked = np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    single = (bits[:, :, None] >> _shifts(bits.device)) & 1
    return single.flatten(1)[:, :columns].bool()


class PackedMasks(Mapping[str, Tensor]):
    """Read-only mapping from layer names to bool masks that are stored as bits.

    A mask is unpacked on every access, so modifying a returned mask has no effect on the mapping.
    The masks of a model with 8 billion weights take 1 GB of CPU memory, instead of 8 GB as bools.

    Args:
        masks: Initial masks, as for `add`.

    Examples:
        >>> masks = PackedMasks()
        >>> masks.add("fc", torch.tensor([[True, False, True]]))
        >>> masks["fc"]
        tensor([[ True, False,  True]])
        >>> bits, columns = masks.packed("fc")
        >>> bits.tolist(), columns
        ([[5]], 3)
        >>> masks == {"fc": torch.tensor([[True, False, True]])}
        True
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks: dict[str, tuple[Tensor, int]] = {}
        for name, mask in (masks or {}).items():
            self.add(name, mask)

    def add(self, name: str, mask: Tensor) -> None:
        """Add a mask, or replace the mask of this name.

        Args:
            name: Layer name.
            mask: Bool, ``(out_features, in_features)``, on any device, True = kept.

        Raises:
            ValueError: The mask is not a bool matrix.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(
                f"mask of layer {name} must be a bool matrix, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        self._masks[name] = pack(mask).cpu(), mask.shape[1]

    def add_packed(self, name: str, bits: Tensor, columns: int) -> None:
        """Add a mask that is packed already, or replace the mask of this name.

        Args:
            name: Layer name.
            bits: uint8, ``(out_features, ceil(columns / 8))``, as returned by `pack`. A CPU tensor
                is stored without a copy.
            columns: ``in_features``.

        Raises:
            ValueError: The bits are not those of a mask with this number of columns.
        """
        width = -(-columns // 8)
        if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[1] != width:
            raise ValueError(
                f"bits of layer {name} must be uint8 of shape (rows, {width}) for {columns} "
                f"columns, got {bits.dtype} of shape {tuple(bits.shape)}"
            )
        # `__eq__` compares whole bytes, so bits that belong to no column must be the same in all.
        if columns % 8 and bool((bits[:, -1] >> columns % 8).any()):
            raise ValueError(f"bits of layer {name} are set beyond its {columns} columns")
        self._masks[name] = bits.cpu(), columns

    def packed(self, name: str) -> tuple[Tensor, int]:
        """Return the bits of a mask, ``(out_features, ceil(columns / 8))``, and its columns."""
        return self._masks[name]

    def __getitem__(self, name: str) -> Tensor:
        """Return the bool mask of a layer, ``(out_features, in_features)``, on the CPU."""
        return unpack(*self._masks[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks  # Mapping's own would unpack the mask

    def __eq__(self, other: object) -> bool:
        """Compare names and masks, in any order, with another mapping of bool masks."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(
            self._equals(name, other) for name in self._masks
        )

    def _equals(self, name: str, other: Mapping[str, Tensor]) -> bool:
        bits, columns = self._masks[name]
        if isinstance(other, PackedMasks):
            other_bits, other_columns = other.packed(name)
            return columns == other_columns and torch.equal(bits, other_bits)
        mask = other[name]
        if not isinstance(mask, Tensor) or mask.shape != (len(bits), columns):
            return False
        return mask.dtype == torch.bool and torch.equal(bits, pack(mask).cpu())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shapes = {name: (len(bits), columns) for name, (bits, columns) in self._masks.items()}
        return f"{type(self).__name__}({shapes})"


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
