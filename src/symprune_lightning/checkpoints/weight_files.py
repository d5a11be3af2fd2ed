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

INFO = "packed.json"
"""Names, shapes and hashes of all tensors of a packed copy."""

BYTES_AT_ONCE = 2**24
"""Number of bytes that `copy_tensor` reads at once."""


def weight_files(folder: Path) -> dict[str, str]:
    """Map tensor names to files.

    Raises:
        FileNotFoundError: There are no weights in safetensors.
        ValueError: The index names a file outside the folder.
    """
    # like transformers, which leaves an index of an earlier save behind
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
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


def refuse_packed(folder: Path) -> None:
    """Raise ``ValueError`` if a folder is a packed copy, which runtimes cannot load."""
    if (folder / INFO).is_file():
        raise ValueError(
            f"{folder} is a packed copy: restore the checkpoint first, see `symprune unpack --help`"
        )


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


def copy_tensor(source: Path, name: str, target: Path) -> None:
    """Copy one tensor to a file of its own, without loading it into memory.

    Args:
        source: A safetensors file.
        name: A tensor in it.
        target: The file to write.

    Raises:
        ValueError: The source is damaged or truncated.
    """
    with open_weights(source):
        pass  # checks that the file has the length that its header says
    with source.open("rb") as opened, target.open("wb") as written:
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size))[name]
        start, end = entry["data_offsets"]
        entry["data_offsets"] = [0, end - start]
        header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
        header += b" " * (-len(header) % 8)  # the data of a file is aligned
        written.write(len(header).to_bytes(8, "little") + header)
        opened.seek(8 + size + start)
        for position in range(start, end, BYTES_AT_ONCE):
            written.write(opened.read(min(BYTES_AT_ONCE, end - position)))


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
