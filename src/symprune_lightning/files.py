"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file with a temporary name that takes its own name when everything is in it.

    Yields:
        The path to write to. If an exception is raised inside, it is deleted, and what was there
        before stays. A process that is killed leaves it behind, to be replaced by the next.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with whole_file(path) as partial:
        ...     _ = partial.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    partial = hidden(path, "partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which may replace an earlier one of that name.

    Yields:
        The folder to write to. What a process that was killed has left is put in order first.
    """
    partial, aside = hidden(path, "partial"), hidden(path, "old")
    if aside.is_dir() and not path.exists():
        aside.rename(path)  # killed between the two renames
    for left in (partial, aside):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for name in names:
                _flush(Path(folder, name))
            _flush(Path(folder))
        _take_name(partial, path, aside)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file of plain values, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def hidden(path: Path, what: str) -> Path:
    """A name beside a file or folder for what belongs to it for a while."""
    return path.with_name(f".{path.name}.{what}")


def _take_name(partial: Path, path: Path, aside: Path) -> None:
    """Rename ``partial`` to ``path``; an earlier folder there is moved aside, then deleted."""
    if path.is_dir():
        path.rename(aside)
        try:
            partial.rename(path)
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside)
    else:
        partial.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
