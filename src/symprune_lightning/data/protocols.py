"""Protocols of publications: how a data set becomes windows of tokens."""

from __future__ import annotations

import os
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.data.reader import check_column
from symprune_lightning.data.texts import check_dataset
from symprune_lightning.errors import PruningWarning

NUM_VALIDATION = 1100
"""Documents of C4 that are evaluated."""

MAX_DRAWS = 1000
"""Documents that are drawn in a row without one that is longer than a window."""


@dataclass(frozen=True)
class WindowProtocol(ABC):
    """How publications turn a data set into windows, exact to the token.

    Texts are encoded as the tokenizer does by default: a beginning-of-sequence token stands in
    front of a text, and so only in the windows that begin one. The random draws are those of
    Python's ``random`` with the seed, in the order of the reference implementations.

    Attributes:
        path: Hub name, or a local folder with files of the same columns.
        name: Configuration of a hub dataset, or the folder of it in a clone of the repository.
        column: Column that contains the texts.
        revision: Branch, tag or commit of a hub dataset. Default: ``None``, its main branch.
    """

    path: str
    name: str | None = None
    column: str = "text"
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))  # settings are written as JSON

    @abstractmethod
    def calibration_windows(
        self, tokenizer: Tokenizer, count: int, length: int, seed: int
    ) -> Tensor:
        """Return ``count`` windows for calibration, ``(count, length)``."""

    @abstractmethod
    def evaluation_ids(self, tokenizer: Tokenizer, length: int) -> Tensor:
        """Return the tokens to evaluate in windows of ``length`` tokens, shape ``(tokens,)``."""

    def rows(self, split: str) -> Any:
        """Return the rows of a split."""
        folder = Path(self.path).expanduser()
        if self.name is not None and (folder / self.name).is_dir():
            folder = folder / self.name  # a clone of the repository, with several configurations
        if folder.is_dir():
            return datasets.load_dataset(str(folder), split=split, data_files=self.files)
        check_dataset(self.path, "pass path=, a folder with its files")
        return datasets.load_dataset(
            self.path, self.name, split=split, data_files=self.files, revision=self.revision
        )

    @property
    def files(self) -> Mapping[str, str] | None:
        """The files of each split; ``None`` for those that ``datasets`` finds."""
        return None

    def texts(self, split: str) -> list[str]:
        """Return the texts of a split."""
        rows = self.rows(split)
        check_column(rows, self.column, self.path)
        return [text for text in rows[self.column] if text is not None]


@dataclass(frozen=True)
class JoinedProtocol(WindowProtocol):
    """Joins all rows of a split to one text, of which windows are taken.

    Attributes:
        calibration_joiner: Joins the rows for calibration.
        evaluation_joiner: Joins the rows for evaluation.
    """

    calibration_joiner: str = " "
    evaluation_joiner: str = "\n\n"

    def calibration_windows(
        self, tokenizer: Tokenizer, count: int, length: int, seed: int
    ) -> Tensor:
        """Return windows at random positions of the training split."""
        ids = encode(tokenizer, self.calibration_joiner.join(self.texts("train")))
        _check_length(self.path, len(ids), length + 1)
        generator = random.Random(seed)
        starts = [generator.randint(0, len(ids) - length - 1) for _ in range(count)]
        return torch.stack([ids[start : start + length] for start in starts])

    def evaluation_ids(self, tokenizer: Tokenizer, length: int) -> Tensor:
        """Return the tokens of the test split."""
        return encode(tokenizer, self.evaluation_joiner.join(self.texts("test")))


@dataclass(frozen=True)
class WikiText2(JoinedProtocol):
    r"""WikiText-2 as in the code of Wanda (arXiv 2306.11695), SparseGPT and GPTQ.

    Evaluation: the rows of the test split joined by two newlines, encoded as one text, consecutive
    windows. Calibration, as in Wanda and SparseGPT: the rows of the training split joined by a
    space, windows at random positions (GPTQ: ``calibration_joiner="\n\n"``).
    """

    path: str = "Salesforce/wikitext"
    name: str | None = "wikitext-2-raw-v1"


@dataclass(frozen=True)
class PTB(JoinedProtocol):
    """Penn Treebank as in the code of SparseGPT (arXiv 2301.00774): sentences joined by a space.

    The data set of the hub is a script, which ``datasets`` does not run any more; ``revision`` is
    the branch that holds the files that the hub has converted. Tokenizers of the LLaMA family split
    the ``<unk>`` of these texts in ways that depend on their version: do not check a set-up by it.
    """

    path: str = "ptb-text-only/ptb_text_only"
    column: str = "sentence"
    revision: str | None = "refs/convert/parquet"
    evaluation_joiner: str = " "


@dataclass(frozen=True)
class C4(WindowProtocol):
    """C4 as in the code of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695).

    Calibration: documents of the first training file are drawn until one is longer than a window,
    of which a random crop is taken. Evaluation: the first 1100 documents of the first validation
    file joined by a space, the first 256 windows.

    Attributes:
        train_file: The training file.
        validation_file: The validation file.
    """

    path: str = "allenai/c4"
    train_file: str = "en/c4-train.00000-of-01024.json.gz"
    validation_file: str = "en/c4-validation.00000-of-00008.json.gz"

    @property
    def files(self) -> Mapping[str, str]:
        """One file for each split."""
        return {"train": self.train_file, "validation": self.validation_file}

    def calibration_windows(
        self, tokenizer: Tokenizer, count: int, length: int, seed: int
    ) -> Tensor:
        """Return random crops of random documents that are longer than a window."""
        texts = self.texts("train")
        generator = random.Random(seed)
        windows = []
        for _ in range(count):
            ids = self._draw(tokenizer, texts, length, generator)
            start = generator.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
        return torch.stack(windows)

    def evaluation_ids(self, tokenizer: Tokenizer, length: int) -> Tensor:
        """Return the tokens of the first validation documents."""
        texts = self.texts("validation")[:NUM_VALIDATION]
        return encode(tokenizer, " ".join(texts))[: 256 * length]

    def _draw(
        self, tokenizer: Tokenizer, texts: list[str], length: int, generator: random.Random
    ) -> Tensor:
        for _ in range(MAX_DRAWS):
            ids = encode(tokenizer, texts[generator.randint(0, len(texts) - 1)])
            if len(ids) > length:
                return ids
        raise ValueError(
            f"none of {MAX_DRAWS} documents drawn from {self.path} is longer than "
            f"sequence_length={length}: use shorter sequences"
        )


PROTOCOLS: Mapping[str, WindowProtocol] = {"wikitext2": WikiText2(), "c4": C4(), "ptb": PTB()}
"""Protocols of data sets of the hub by name."""


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the token ids of a text, with the special tokens that the tokenizer adds."""
    # verbose=False: no warning about texts longer than the context
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def consecutive(name: str, ids: Tensor, count: int | None, length: int) -> Tensor:
    """Return the first ``count`` windows of a text, or all, ``(windows, length)``.

    The tokens after the last whole window are dropped, as the publications do.
    """
    available = len(ids) // length
    if count is None:
        count = available
    elif count < available:
        warnings.warn(
            f"{name} has {available} windows of {length} tokens, of which the first {count} are "
            f"evaluated; publications evaluate all (evaluation_sequences=None)",
            PruningWarning,
            stacklevel=4,
        )
    _check_length(name, len(ids), max(count, 1) * length)
    return ids[: count * length].view(count, length)


def _check_length(name: str, available: int, required: int) -> None:
    if available < required:
        raise ValueError(
            f"{name} is too short: it has {available:,} tokens, and {required:,} are needed; use "
            f"fewer or shorter sequences"
        )
