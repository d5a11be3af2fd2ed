"""Atomic writes of files and directories."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = "partial"
"""Suffix of files and folders that are not complete yet."""


@contextmanager
def atomic_file(path: Path, suffix: str = PARTIAL) -> Iterator[Path]:
    """Write a file under a temporary name and rename it to ``path`` once it is complete.

    Args:
        path: The file.
        suffix: Suffix of the temporary name, which differs for ranks that may write the same file.

    Yields:
        The path to write to. If an exception is raised inside, it is deleted and an earlier file
        stays. A killed process leaves it behind, to be overwritten by the next.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_file(path) as tmp:
        ...     _ = tmp.write_text("complete")
        >>> path.read_text()
        'complete'
    """
    tmp = hidden_sibling(path, suffix)
    try:
        yield tmp
        _finish_file(tmp)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    _fsync(path.parent)  # the rename itself is data of the folder


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Write a directory under a temporary name and rename it to ``path`` once it is complete.

    An earlier directory of that name is replaced.

    Yields:
        The directory to write to. Leftovers of a killed process are cleaned up first.
    """
    tmp, backup = hidden_sibling(path, PARTIAL), hidden_sibling(path, "old")
    if backup.is_dir() and not path.exists():
        backup.rename(path)  # the process was killed between the two renames
    for leftover in (tmp, backup):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for folder, _, names in os.walk(tmp):
            for name in names:
                _finish_file(Path(folder, name))
            _fsync(Path(folder))
        _replace_directory(tmp, path, backup)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def hidden_sibling(path: Path, suffix: str) -> Path:
    """Return the path of temporary data that belongs to ``path``: a hidden sibling of it."""
    return path.with_name(f".{path.name}.{suffix}")


def _replace_directory(tmp: Path, path: Path, backup: Path) -> None:
    """Rename ``tmp`` to ``path``; an earlier directory is renamed first, then deleted."""
    if path.is_dir():
        # a directory that is not empty cannot be replaced in one call
        path.rename(backup)
        try:
            tmp.rename(path)
        except OSError:
            backup.rename(path)
            raise
        shutil.rmtree(backup)
    else:
        tmp.rename(path)
    _fsync(path.parent)


def _finish_file(path: Path) -> None:
    """Give a file the permissions of any new one, and write it to the disk."""
    if path.stat().st_mode & 0o077 == 0:
        # safetensors makes files that only their owner can read, whatever the umask
        mask = os.umask(0o077)
        os.umask(mask)
        with suppress(OSError):  # a file system without permissions
            path.chmod(0o666 & ~mask)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
