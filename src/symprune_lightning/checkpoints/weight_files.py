"""Weight files of a checkpoint: safetensors with or without an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> dict[str, str]:
    """Map tensor names to files.

    Raises:
        FileNotFoundError: There are no weights in safetensors.
        ValueError: The index names a file outside the folder.
    """
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = dict(index["weight_map"])
        check_inside(files)
        return files
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {INDEX} nor {SINGLE}: only weights in safetensors are read"
        )
    with open_weights(folder / SINGLE) as opened:
        return dict.fromkeys(opened.keys(), SINGLE)


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: It is damaged or truncated.
    """
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from error
    with opened:
        yield opened


def check_inside(files: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if a file of a tensor is outside the folder of the checkpoint."""
    for name, file in files.items():
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"tensor {name} is in {file}, outside the folder of the checkpoint")


def sample_hash(files: Iterable[Path]) -> str:
    """Hash bytes at regular offsets; hashing all of them takes as long as pruning."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for offset in range(0, size, max(1, size // 64)):
                opened.seek(offset)
                digest.update(opened.read(4096))
    return digest.hexdigest()


def read_tensors(
    folder: Path, files: Mapping[str, str], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name; each file is opened once.

    Args:
        folder: Folder of the checkpoint.
        files: Tensor name to file, see ``weight_files``.
        names: Tensors to read.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    for file, members in by_file.items():
        with open_weights(folder / file) as opened:
            for name in members:
                yield name, opened.get_tensor(name)
