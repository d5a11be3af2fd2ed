"""Sources of texts: files, datasets of the hub, and iterables in memory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets

PYTHON_DOCS = "python-docs"
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSource:
    """A dataset of texts, loaded with ``datasets.load_dataset``.

    Attributes:
        path: Hub name, local folder, or a ``.txt`` (one text per paragraph), ``.json``, ``.jsonl``
            or ``.parquet`` file.
        name: Configuration of a hub dataset, such as ``"wikitext-2-raw-v1"``. Default: ``None``.
        split: Split of the dataset, also a slice such as ``"train[:100]"``. Default: ``"train"``.
        column: Column that contains the texts. Default: ``"text"``.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"


# The order matters: jsonargparse tries the members of a union from left to right. {"path": ...} has
# to be parsed as one source before it is tried as a mapping of several, and PathLike comes last
# because it accepts any value unchanged.
Texts = TextSource | str | Iterable[Any] | PathLike[str]
Evaluation = TextSource | Mapping[str, Texts] | None | Texts


def load_texts(source: Texts) -> Iterable[Any]:
    """Return the texts of a source, or its lists of token ids.

    Raises:
        FileNotFoundError: The source is a text file that does not exist.
        ValueError: The dataset has no such column.
    """
    if isinstance(source, str) and source == PYTHON_DOCS:
        return list(topics.values())
    if isinstance(source, str | PathLike):
        source = TextSource(os.fspath(source))
    if isinstance(source, datasets.Dataset):
        return _column(source, "text", "the dataset")
    if not isinstance(source, TextSource):
        return source
    path = Path(source.path).expanduser()
    if path.suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
        options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        dataset = datasets.load_dataset(
            FORMATS[path.suffix], data_files=str(path), split=source.split, **options
        )
    else:
        name = str(path) if path.exists() else source.path
        dataset = datasets.load_dataset(name, source.name, split=source.split)
    return _column(dataset, source.column, source.path)


def _column(dataset: datasets.Dataset, column: str, name: str) -> Iterable[str]:
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; its columns are: {', '.join(dataset.column_names)}"
        )
    texts: Iterable[str] = dataset[column]
    return texts


def shuffled(texts: Iterable[Any], seed: int) -> Iterable[Any]:
    """Return the texts of a sequence in random order; other iterables keep their order."""
    # a stream may be endless, and shuffling would have to read all of it
    if not isinstance(texts, Sequence):
        return texts
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    return (texts[i] for i in order)


def source_settings(source: Evaluation) -> Any:
    """Return a JSON-serializable description of a source of texts."""
    if isinstance(source, Mapping):
        return {"sets": {name: source_settings(texts) for name, texts in source.items()}}
    if isinstance(source, TextSource):
        return asdict(source)
    if isinstance(source, PathLike):
        return os.fspath(source)
    if source is None or isinstance(source, str):
        return source
    return {"iterable": type(source).__name__}
