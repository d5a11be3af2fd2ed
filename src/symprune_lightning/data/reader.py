"""Reading of texts: order, columns, and rows without text."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isnan
from os import PathLike
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
from torch.utils.data import DataLoader

from symprune_lightning.data.texts import PYTHON_DOCS, Texts, TextSource
from symprune_lightning.errors import PruningWarning

SHUFFLE_BUFFER = 1000
"""Rows among which a stream is shuffled."""

MAX_EMPTY = 0.1
"""Share of empty rows above which the rows are lines, and no documents."""

NUM_JUDGED = 200
"""Rows from which that is judged."""

MAX_PATH = 4096
"""Characters of a path; a longer string is a text."""

MIN_JUDGED = 20
"""Number of rows below which it is not judged."""


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
        if isinstance(source, str) and ("\n" in source or len(source) > MAX_PATH):
            raise ValueError(
                f"{name} is one text of {len(source)} characters, where a path or a name of the "
                f"hub is expected: pass a list of texts, [text]"
            )
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
            lines = [self._line(i, x) for i, x in enumerate(rows)]
            self._num_read = len(lines)
            yield self._source.joiner.join(lines)
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

    def describe_rows(self) -> str:
        """Return how many rows were read and skipped, and what makes a row of a text file."""
        advice = ""
        if self._num_read == 1 and Path(self.name).suffix.lower() == ".txt":
            advice = "; texts of a .txt file are separated by empty lines"
        if not self._skipped:
            return f"{self.name} has {self._num_read} texts{advice}"
        return f"{self.describe_skipped()}{advice}"

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
        check_one_split(rows, self.name)
        if isinstance(rows, DataLoader):
            raise ValueError(
                f"{self.name} is a DataLoader, which yields batches: pass its dataset, "
                f"loader.dataset"
            )
        if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # iterates over its columns
            raise ValueError(
                f"{self.name} is a {type(rows).__name__}: pass one of its columns as a list of "
                f"texts, frame['text'].tolist()"
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
        return rows

    def _shuffled(self) -> Iterator[tuple[int, Any]]:
        """Yield texts and the numbers of their rows."""
        for i, row in shuffled(self._rows, self.seed):
            yield i, self._text_of(i, row)

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


def shuffled(rows: Any, seed: int) -> Iterator[tuple[int, Any]]:
    """Yield rows in random order, with their numbers.

    Sequences and datasets are shuffled, streams within a buffer; other iterables keep their order.
    """
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    # an iterable may be endless, and shuffling would have to read all of it
    if not isinstance(rows, Sequence | datasets.Dataset):
        yield from enumerate(rows)
        return
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    yield from ((i, rows[i]) for i in order)


def check_one_split(rows: Any, name: str) -> None:
    """Raise ``ValueError`` if a dataset has several splits."""
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"{name} has the splits {', '.join(rows)}: pass one of them, such as "
            f"dataset[{next(iter(rows))!r}]"
        )


def check_column(rows: Any, column: str, name: str) -> None:
    """Raise ``ValueError`` if a dataset has no such column; streams may not know theirs."""
    columns = rows.column_names
    if columns is not None and column not in columns:
        raise ValueError(
            f"{name} has no column {column!r}; its columns are: {', '.join(columns)}. Name one, "
            f"TextSource(column=...), or rename it, dataset.rename_column(..., {column!r})"
        )


def is_blank(text: Any) -> bool:
    """Return whether a text has only white space, or a list no entries."""
    return not text.strip() if isinstance(text, str) else len(text) == 0
