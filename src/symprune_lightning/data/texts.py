"""Sources of texts: files, datasets of the hub, and iterables in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from symprune_lightning.checkpoints.hub import check_hub

PYTHON_DOCS = "python-docs"
SELF = "self"
"""Name of the source that samples texts from the model."""
FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


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
        object.__setattr__(self, "path", os.fspath(self.path))  # settings are written as JSON
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

    def _are_text_files(self, folder: Path) -> bool:
        """Return whether the files of a folder or hub dataset are ``.txt`` files, as far as known.

        Their texts are paragraphs, as those of a single file are.
        """
        if self.data_files:
            names = [self.data_files] if isinstance(self.data_files, str) else self.data_files
            return all(_suffixes(Path(name)) == [".txt"] for name in names)
        files = [x for x in folder.rglob("*") if x.is_file() and not x.name.startswith(".")]
        return bool(files) and all(_suffixes(x) == [".txt"] for x in files)

    def load(self) -> Any:
        """Return the dataset.

        Raises:
            FileNotFoundError: ``path`` is a text file that does not exist.
            ValueError: The file is empty, or has another format.
            OSError: It is a dataset of the hub, which cannot be reached.
        """
        path = Path(self.path).expanduser()
        file_format = self._file_format
        options: dict[str, Any] = {}
        if file_format == "text" or (file_format is None and self._are_text_files(path)):
            options["sample_by"] = "paragraph"
        if file_format is None:
            if self.path == SELF and not path.exists():
                raise ValueError(
                    f"{SELF!r} is a source of calibration texts only: evaluate on other texts"
                )
            if path.is_file():
                raise ValueError(
                    f"{path} has no known format: use one of {', '.join(FORMATS)}, also compressed"
                )
            is_builder = bool(self.data_files) and "/" not in self.path  # such as "json"
            if not path.exists() and not is_builder:
                check_dataset(self.path, f"pass a file or folder (./{self.path})")
            return datasets.load_dataset(
                str(path) if path.exists() else self.path,
                self.name,
                **options,
                split=self.split,
                streaming=self.streaming,
                data_files=self._files,
                revision=self.revision,
            )
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
        if ".tsv" in _suffixes(path):
            options["sep"] = "\t"
        try:
            return datasets.load_dataset(
                file_format,
                data_files=str(path),
                split=self.split,
                streaming=self.streaming,
                **options,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"{path} has no text, or is no {file_format} file: {reason}"
            ) from error


# The order matters: jsonargparse tries the members of a union from left to right. {"path": ...} has
# to be parsed as one source before it is tried as a mapping of several, and Path comes last
# because it accepts any value unchanged.
Texts = TextSource | str | Iterable[Any] | Path


def check_dataset(name: str, advice: str) -> None:
    """Raise ``OSError`` for a dataset of the hub that is not in the caches, without a network."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    # datasets names its folders in snake case
    processed = {_letters(folder.name) for folder in cache.glob("*")} if cache.is_dir() else set()
    if not datasets.config.HF_HUB_OFFLINE and _letters(name) not in processed:
        check_hub(name, "dataset", advice)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _suffixes(path: Path) -> list[str]:
    """Return the last suffix of a file in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1:]
