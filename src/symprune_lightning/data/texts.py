"""Sources of texts: files, datasets of the hub, and iterables in memory."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from os import PathLike
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets

from symprune_lightning.errors import PruningWarning

PYTHON_DOCS = "python-docs"
FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled."""

MAX_EMPTY = 0.1
"""Share of empty rows above which the rows are lines, and no documents."""

NUM_JUDGED = 200
"""Rows from which that is judged."""

MIN_JUDGED = 20
"""Number of rows below which it is not judged."""


@dataclass(frozen=True)
class TextSource:
    r"""A dataset of texts, loaded with ``datasets.load_dataset``.

    Attributes:
        path: Hub name, local folder, or a ``.txt`` (one text per paragraph), ``.json``, ``.jsonl``,
            ``.csv``, ``.tsv`` or ``.parquet`` file, also compressed (``.json.gz``, ``.jsonl.zst``).
        name: Configuration of a hub dataset, such as ``"wikitext-2-raw-v1"``. Default: ``None``.
        split: Split of the dataset, also a slice such as ``"train[:100]"``. Default: ``"train"``.
        column: Column that contains texts, lists of token ids, or chats: lists of messages with
            ``role`` and ``content``, which the tokenizer's chat template formats. Default:
            ``"text"``.
        joiner: Joins all rows to one text, for datasets whose rows are lines of documents:
            ``"\n\n"`` as the publications do for wikitext. Default: ``None``, every row is a
            document.
        streaming: Read rows as they are needed, for a dataset that does not fit on the disk. It is
            shuffled within a buffer of 1000 rows. Default: ``False``.
        data_files: Files of the hub dataset or folder that are read, such as
            ``"en/c4-train.00000-of-01024.json.gz"`` or a pattern. Default: ``()``, all of the
            split.
        revision: Branch, tag or commit of a hub dataset. Default: ``None``, its main branch.

    Raises:
        ValueError: ``data_files`` or ``revision`` is passed for a single file.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    joiner: str | None = None
    streaming: bool = False
    data_files: str | tuple[str, ...] = ()
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data_files, str):  # a list, as files of settings have it
            object.__setattr__(self, "data_files", tuple(self.data_files))
        if self._file_format is not None and (self.data_files or self.revision):
            raise ValueError(
                f"path={self.path!r} is a single file: data_files and revision choose among the "
                f"files of a hub dataset or folder"
            )

    @property
    def _files(self) -> dict[str, str | list[str]] | None:
        """``data_files`` by split, as ``datasets`` takes them."""
        if not self.data_files:
            return None
        files = self.data_files if isinstance(self.data_files, str) else list(self.data_files)
        return {self.split.partition("[")[0]: files}

    @property
    def _file_format(self) -> str | None:
        """The builder of ``datasets`` for a file; ``None`` for a folder or a hub name."""
        return next((FORMATS.get(x) for x in _suffixes(Path(self.path))), None)

    def load(self) -> Any:
        """Return the dataset.

        Raises:
            FileNotFoundError: ``path`` is a text file that does not exist.
        """
        path = Path(self.path).expanduser()
        file_format = self._file_format
        if file_format is None:
            return datasets.load_dataset(
                str(path) if path.exists() else self.path,
                self.name,
                split=self.split,
                streaming=self.streaming,
                data_files=self._files,
                revision=self.revision,
            )
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
        options: dict[str, Any] = {}
        if file_format == "text":
            options["sample_by"] = "paragraph"
        if ".tsv" in _suffixes(path):
            options["sep"] = "\t"
        return datasets.load_dataset(
            file_format,
            data_files=str(path),
            split=self.split,
            streaming=self.streaming,
            **options,
        )


# The order matters: jsonargparse tries the members of a union from left to right. {"path": ...} has
# to be parsed as one source before it is tried as a mapping of several, and PathLike comes last
# because it accepts any value unchanged.
Texts = TextSource | str | Iterable[Any] | PathLike[str]


class TextReader:
    """Yields the texts of a source in random order, and counts the rows that it skips.

    Sequences are shuffled, streams within a buffer; other iterables keep their order.

    Args:
        source: The source.
        seed: Seed of the shuffle.
        name: Name of the source in messages, if it has none.

    Raises:
        FileNotFoundError: The source is a text file that does not exist.
        ValueError: The dataset has no such column, or several splits.
    """

    def __init__(self, source: Texts, seed: int, name: str) -> None:
        self.seed = seed
        if isinstance(source, str) and source == PYTHON_DOCS:
            source = list(topics.values())
        if isinstance(source, str | PathLike):
            source = TextSource(os.fspath(source))
        self.name, self.column = name, "text"
        self._source = source if isinstance(source, TextSource) else None
        if self._source is not None:
            self.name, self.column = self._source.path, self._source.column
        self.is_joined = self._source is not None and self._source.joiner is not None
        self._is_column = False
        self._rows = self._texts_of(source if self._source is None else self._source.load())
        self._num_read = 0
        self._skipped: list[int] = []
        if isinstance(self._rows, Sequence) and not self.is_joined:
            self._check_documents([self._text_of(i, x) for i, x in self._first_rows()])

    def __iter__(self) -> Iterator[Any]:
        if self._source is not None and self._source.joiner is not None:
            rows = (self._text_of(i, row) for i, row in enumerate(self._rows))
            yield self._source.joiner.join(self._line(i, x) for i, x in enumerate(rows))
            return
        for number, text in self._shuffled():
            self._num_read += 1
            if text is None or is_blank(text):
                self._skipped.append(number)
            else:
                yield text

    def report_skipped(self) -> None:
        """Warn once about the rows that were skipped."""
        if self._skipped:
            warnings.warn(
                f"{self.describe_skipped()}, such as row {min(self._skipped)}",
                PruningWarning,
                stacklevel=2,
            )
            self._skipped.clear()

    def describe_skipped(self) -> str:
        """Return how many of the rows that were read have no text."""
        return (
            f"{len(self._skipped)} of {self._num_read} rows of {self.name} have no text in column "
            f"{self.column!r} and were skipped"
        )

    def _first_rows(self) -> Iterator[tuple[int, Any]]:
        yield from ((i, self._rows[i]) for i in range(min(NUM_JUDGED, len(self._rows))))

    def _check_documents(self, texts: Sequence[Any]) -> None:
        """Refuse rows that are lines of documents: many of them are empty."""
        empty = sum(text is not None and is_blank(text) for text in texts)
        if len(texts) < MIN_JUDGED or empty <= MAX_EMPTY * len(texts):
            return
        advice = "join the rows before passing them"
        if self._source is not None:
            advice = f"join them to one text, {replace(self._source, joiner=chr(10) * 2)}"
        raise ValueError(
            f"{empty} of the first {len(texts)} rows of {self.name} are empty, so its rows are "
            f"lines and no documents: {advice}"
        )

    def _line(self, number: int, text: Any) -> str:
        if text is None or isinstance(text, str):
            return text or ""
        raise ValueError(
            f"row {number} of {self.name} has a {type(text).__name__} in column "
            f"{self.column!r}, and only texts can be joined"
        )

    def _texts_of(self, rows: Any) -> Any:
        """Return the column of a dataset; other iterables as they are."""
        if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
            splits = ", ".join(rows)
            raise ValueError(
                f"{self.name} has the splits {splits}: pass one of them, such as "
                f"dataset[{next(iter(rows))!r}]"
            )
        if isinstance(rows, Mapping | bytes):
            raise ValueError(
                f"{self.name} is a {type(rows).__name__}: pass an iterable of texts, of token ids "
                f"or of rows"
            )
        if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
            return rows
        check_column(rows, self.column, self.name)
        if isinstance(rows, datasets.Dataset):
            self._is_column = True
            return rows[self.column]
        if self.is_joined:
            return rows
        return rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)

    def _shuffled(self) -> Iterator[tuple[int, Any]]:
        """Yield texts and the numbers of their rows."""
        rows = self._rows
        # a stream may be endless, and shuffling would have to read all of it
        if not isinstance(rows, Sequence):
            yield from ((i, self._text_of(i, row)) for i, row in enumerate(rows))
            return
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        yield from ((i, self._text_of(i, rows[i])) for i in order)

    def _text_of(self, number: int, row: Any) -> Any:
        """Return the text, the token ids or the chat of a row; ``None`` if it has none."""
        if isinstance(row, Mapping) and not self._is_column:
            if self.column not in row:
                raise ValueError(
                    f"the rows of {self.name} have no column {self.column!r}; their columns are: "
                    f"{', '.join(map(str, row))}"
                )
            row = row[self.column]
        is_missing = row is None or (isinstance(row, float) and isnan(row))  # of pandas
        if is_missing or isinstance(row, str):
            return None if is_missing else row
        if isinstance(row, bytes | Mapping) or not hasattr(row, "__len__"):
            raise ValueError(
                f"row {number} of {self.name} has a {type(row).__name__} in column "
                f"{self.column!r}: pass texts, lists of token ids, or chats (lists of messages)"
            )
        return row


def check_column(rows: Any, column: str, name: str) -> None:
    """Raise ``ValueError`` if a dataset has no such column; streams may not know theirs."""
    columns = rows.column_names
    if columns is not None and column not in columns:
        raise ValueError(f"{name} has no column {column!r}; its columns are: {', '.join(columns)}")


def is_blank(text: Any) -> bool:
    """Return whether a text has only white space, or a list no entries."""
    return not text.strip() if isinstance(text, str) else len(text) == 0


def _suffixes(path: Path) -> list[str]:
    """Return the last suffix of a file in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1:]
