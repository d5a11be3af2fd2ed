"""Where the hidden states of waiting batches are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CPU = "cpu"


def park(x: Tensor, place: str | os.PathLike[str]) -> Callable[[], None]:
    """Move a tensor's values elsewhere, and free their memory.

    The tensor stays what it is, for whoever holds it, but must not be read before the values are
    back.

    Args:
        x: The tensor; all views of its storage are emptied with it.
        place: ``"cpu"`` for the CPU's memory, or a folder for a file on disk.

    Returns:
        Brings the values back. To be called once.

    Raises:
        OSError: The folder can't be written to.
    """
    storage = x.untyped_storage()
    size = storage.nbytes()
    if not size or not storage.resizable() or (place == CPU and x.device.type == CPU):
        return lambda: None
    values = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
    values = values.to(CPU, copy=True)  # numpy would make the storage itself fixed in size
    file = None if place == CPU else _written(values, Path(place))
    kept = values if file is None else None
    storage.resize_(0)

    def back() -> None:
        storage.resize_(size)
        found = torch.from_file(str(file), size=size, dtype=torch.uint8) if kept is None else kept
        torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage).copy_(found)
        if file is not None:
            file.unlink()

    return back


def _written(values: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".waiting", delete=False) as file:
        values.numpy().tofile(file)
    return Path(file.name)
