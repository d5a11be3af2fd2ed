"""Offloading of hidden states while their batches are suspended."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

CPU = "cpu"


class OffloadedTensor:
    """A tensor whose values were moved to CPU memory or to disk.

    The tensor object stays valid for whoever holds it, with an empty storage; it must not be read
    before ``restore`` or outside of ``loaded``.

    Args:
        x: The tensor; all views of its storage are emptied with it.
        target: ``"cpu"`` for CPU memory, or a folder for a file on disk.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, x: Tensor, target: str | os.PathLike[str]) -> None:
        self._storage = x.untyped_storage()
        self._device = x.device
        self._size = self._storage.nbytes()
        self._values: Tensor | None = None
        self._file: Path | None = None
        on_target = target == CPU and x.device.type == CPU
        if not self._size or not self._storage.resizable() or on_target:
            return
        # a copy: numpy on the storage itself would fix its size
        values = self._bytes().to(CPU, copy=True)
        if target == CPU:
            self._values = values
        else:
            self._file = _write(values, Path(target))
        self._storage.resize_(0)

    def restore(self) -> None:
        """Copy the values back into the tensor; further calls have no effect."""
        if self._load() and self._file is not None:
            self._file.unlink()
        self._values = self._file = None

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Make the tensor readable inside the context; changes are lost."""
        is_offloaded = self._load()
        try:
            yield
        finally:
            if is_offloaded:
                self._storage.resize_(0)

    def _load(self) -> bool:
        """Copy the values into the tensor; return whether they were offloaded."""
        values = self._values
        if self._file is not None:
            values = torch.from_file(str(self._file), size=self._size, dtype=torch.uint8)
        if values is None:
            return False
        self._storage.resize_(self._size)
        self._bytes().copy_(values)
        return True

    def _bytes(self) -> Tensor:
        """Return the storage as a tensor of bytes."""
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(self._storage)


def _write(values: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".offloaded", delete=False) as file:
        values.numpy().tofile(file)
    return Path(file.name)
