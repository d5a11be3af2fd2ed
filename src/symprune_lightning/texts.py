"""Sources of texts: files, datasets of the hub, and iterables in memory."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    joiner: str | None = None
    streaming: bool = False

    def load(self) -> Any:
        """Return the dataset.

        Raises:
            FileNotFoundError: ``path`` is a text file that does not exist.
        """
        path = Path(self.path).expanduser()
        file_format = _file_format(path)
        if file_format is None:
            name = str(path) if path.exists() else self.path
            return datasets.load_dataset(
                name, self.name, split=self.split, streaming=self.streaming
            )
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
        options: dict[str, Any] = {}
        if file_format == "text":
            options["sample_by"] = "paragraph"
        if ".tsv" in path.name.lower():
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
        self.name, self.column, self._joiner = name, "text", None
        self._rows: Any = source
        if isinstance(source, TextSource):
            self.name, self.column, self._joiner = source.path, source.column, source.joiner
            self._rows = source.load()
        self._rows = self._texts_of(self._rows)
        self._num_read = 0
        self._num_empty = 0
        self._skipped: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        if self._joiner is not None:
            yield self._joiner.join(text for text in self._rows if text is not None)
            return
        for number, text in self._shuffled():
            self._num_read += 1
            if text is None or len(text) == 0:
                self._num_empty += text is not None
                self._skipped.append(number)
            else:
                yield text

    def report_skipped(self) -> None:
        """Warn about the rows that were skipped.

        Raises:
            ValueError: So many are empty that the rows are lines, and no documents.
        """
        if not self._skipped:
            return
        count, number = len(self._skipped), min(self._skipped)
        if self._num_empty > MAX_EMPTY * self._num_read:
            raise ValueError(
                f"{self._num_empty} of {self._num_read} rows of {self.name} are empty, so its rows "
                f"are lines and no documents: join them to one text, TextSource({self.name!r}, "
                f"joiner='\\n\\n')"
            )
        warnings.warn(
            f"{count} of {self._num_read} rows of {self.name} have no text in column "
            f"{self.column!r} and were skipped, such as row {number}",
            PruningWarning,
            stacklevel=2,
        )

    def _texts_of(self, rows: Any) -> Any:
        """Return the column of a dataset; other iterables as they are."""
        if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
            splits = ", ".join(rows)
            raise ValueError(
                f"{self.name} has the splits {splits}: pass one of them, such as "
                f"dataset[{next(iter(rows))!r}]"
            )
        if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
            return rows
        columns = rows.column_names
        if columns is not None and self.column not in columns:
            raise ValueError(
                f"{self.name} has no column {self.column!r}; its columns are: {', '.join(columns)}"
            )
        if isinstance(rows, datasets.IterableDataset):
            return rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        return rows[self.column]

    def _shuffled(self) -> Iterator[tuple[int, Any]]:
        """Yield texts and the numbers of their rows."""
        rows = self._rows
        # a stream may be endless, and shuffling would have to read all of it
        if not isinstance(rows, Sequence):
            yield from ((i, self._text_of(row)) for i, row in enumerate(rows))
            return
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        yield from ((i, self._text_of(rows[i])) for i in order)

    def _text_of(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        if self.column not in row:
            raise ValueError(
                f"the rows of {self.name} have no column {self.column!r}; their columns are: "
                f"{', '.join(map(str, row))}"
            )
        return row[self.column]


def _file_format(path: Path) -> str | None:
    """Return the builder of ``datasets`` that reads a file; ``None`` for a folder or a hub name."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None
