"""Calibration and evaluation text, packed into sequences of one length."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.pretrained import IGNORE, load_tokenizer

PYTHON_DOCS = "python-docs"
EVALUATION = "evaluation"
"""The part that is evaluated on; of several, the name follows behind a slash."""

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSource:
    """A data set of texts, read through ``datasets``.

    Attributes:
        path: Hub name, local folder, or a ``.txt`` (texts are paragraphs), ``.jsonl`` or
            ``.parquet`` file.
        name: Configuration of a hub data set, such as ``"wikitext-2-raw-v1"``.
        split: Which split.
        column: The column that holds the text.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"


# In this order for the command line: {"path": ...} is one source, {"wiki": ..., ...} are several,
# and what is taken for a path-like is taken as it stands, whatever it is.
Texts = TextSource | str | Iterable[Any] | PathLike[str]
Evaluation = TextSource | Mapping[str, Texts] | None | Texts


class CalibrationDataModule(LightningDataModule):
    """Packs texts into sequences for calibration and, apart from these, for evaluation.

    Texts are shuffled, tokenised, ended with the end-of-sequence token, and laid end to end until a
    part is full. A text is never in both parts. The same texts, tokenizer, sizes and seed give the
    same tokens, and ``hashes`` proves it.

    Args:
        dataset: ``"python-docs"`` (the standard library's manual, always there; 113 thousand
            tokens of a 49k vocabulary), a hub data set, local folder or text file, a
            ``TextSource``, or any iterable of texts or of lists of token ids.
        tokenizer: A tokenizer, or the model's name as in ``CausalLMModule``. Not needed for token
            ids.
        sequences: How many sequences to calibrate on. 128, as in the papers.
        sequence_length: Tokens in a sequence. 2048, as in the papers.
        evaluation: Texts to evaluate on; ``None`` takes further texts of ``dataset``. Several, by
            name, are evaluated together and each on its own: ``{"wiki": ..., "code": ...}``.
        evaluation_sequences: How many sequences to evaluate on, of each if there are several.
        training_sequences: How many sequences to train on in ``fit``: texts of ``dataset`` that are
            in neither other part.
        batch_size: Sequences in a batch.
        trust_remote_code: Let the tokenizer run code of its own. Off unless you say so.
        seed: Of the shuffle. An iterable that is no sequence is taken in its own order.

    Raises:
        ValueError: A size is not positive, there are too few texts, or a tokenizer is missing.
        FileNotFoundError: ``dataset`` is a path, and nothing is there.

    Examples:
        >>> data = CalibrationDataModule([[1, 2, 3], [4, 5, 6], [7, 8, 9]], sequences=1,
        ...                              sequence_length=2, evaluation_sequences=2, seed=0)
        >>> data.setup()
        >>> next(iter(data.calibration_dataloader()))["input_ids"].shape
        torch.Size([1, 2])
        >>> len(data.hashes["calibration"])
        64
    """

    def __init__(
        self,
        dataset: Texts,
        tokenizer: Tokenizer | str | None = None,
        *,
        sequences: int = 128,
        sequence_length: int = 2048,
        evaluation: Evaluation = None,
        evaluation_sequences: int = 64,
        training_sequences: int = 0,
        batch_size: int = 1,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "sequences": sequences,
            "sequence_length": sequence_length,
            "evaluation_sequences": evaluation_sequences,
            "batch_size": batch_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if isinstance(evaluation, Mapping) and not (evaluation and all(evaluation)):
            raise ValueError("evaluation is a mapping: give it one text at least, each with a name")
        if training_sequences < 0:
            raise ValueError(f"training_sequences is {training_sequences}; it must not be negative")
        self.dataset = dataset
        self.evaluation = evaluation
        self.sequences = sequences
        self.sequence_length = sequence_length
        self.evaluation_sequences = evaluation_sequences
        self.training_sequences = training_sequences
        self.batch_size = batch_size
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self._tokenizer = tokenizer
        self._parts: dict[str, Tensor] = {}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, loaded when first asked for."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(
                self._tokenizer, trust_remote_code=self.trust_remote_code
            )
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Tokenise and pack all parts, once."""
        if self._parts:
            return
        tokens = self._tokens(self.dataset)
        parts = {"calibration": self._pack(tokens, self.sequences, "calibration")}
        for part, texts in self._evaluated().items():
            other = tokens if texts is None else self._tokens(texts)
            parts[part] = self._pack(other, self.evaluation_sequences, part)
        if self.training_sequences:
            parts["training"] = self._pack(tokens, self.training_sequences, "training")
        self._parts = parts

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of ``{"input_ids": (batch_size, sequence_length)}`` to calibrate on."""
        return self._loader("calibration")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches to train on, in the same order every time.

        Raises:
            ValueError: ``training_sequences`` is 0.
        """
        if not self.training_sequences:
            raise ValueError("there is nothing to train on: give training_sequences=…")
        return self._loader("training")

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Batches to evaluate on; by name, if there are several texts.

        With several processes, rows in which nothing is to be predicted make the set divisible, so
        that Lightning's sampler repeats none and the perplexity is that of one process.
        """
        loaders = {part.partition("/")[2]: self._loader(part) for part in self._evaluated()}
        return loaders.get("", loaders)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The same batches as ``val_dataloader``."""
        return self.val_dataloader()

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's token ids (int64, little-endian, row by row)."""
        self.setup()
        return {
            part: hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
            for part, ids in self._parts.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Where the tokens came from, in plain values, as the manifest records it."""
        parts = ("sequences", "evaluation_sequences", "training_sequences")
        sizes = (*parts, "sequence_length", "batch_size", "seed")
        return {
            "dataset": _described(self.dataset),
            "evaluation": _described(self.evaluation),
            **{name: getattr(self, name) for name in sizes},
            "sha256": self.hashes,
        }

    def _loader(self, part: str) -> DataLoader[dict[str, Tensor]]:
        self.setup()
        rows: Any = [{"input_ids": ids} for ids in self._parts[part]]
        if part in self._evaluated():
            rows = _filled_up(rows, self._processes)
        return DataLoader(rows, batch_size=self.batch_size)

    def _evaluated(self) -> dict[str, Texts | None]:
        """Part to what is evaluated on there."""
        if isinstance(self.evaluation, Mapping):
            return {f"{EVALUATION}/{name}": texts for name, texts in self.evaluation.items()}
        return {EVALUATION: self.evaluation}

    @property
    def _processes(self) -> int:
        """How many processes the Trainer divides the evaluation set among."""
        dealt = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return 1 if dealt is None else int(dealt["num_replicas"])

    def _pack(self, texts: Iterator[Sequence[int]], sequences: int, part: str) -> Tensor:
        """Lay texts end to end until ``sequences`` are full; the rest of the last is dropped."""
        wanted = sequences * self.sequence_length
        ids: list[int] = []
        for text in texts:
            ids.extend(text)
            if len(ids) >= wanted:
                return torch.tensor(ids[:wanted]).view(sequences, self.sequence_length)
        raise ValueError(
            f"the texts for {part} are too short: {sequences} sequences of {self.sequence_length} "
            f"need {wanted:,} tokens, but only {len(ids):,} are there; lower {part} sizes or give "
            f"more text"
        )

    def _tokens(self, source: Texts) -> Iterator[Sequence[int]]:
        for text in _shuffled(_texts(source), self.seed):
            yield self._encode(text) if isinstance(text, str) else [int(i) for i in text]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("texts need a tokenizer: pass tokenizer=<name of the model>")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, end]


def _filled_up(rows: list[dict[str, Tensor]], processes: int) -> list[dict[str, Tensor]]:
    """As many rows for each process; those added have no label, so that they count for nothing."""
    missing = -len(rows) % processes
    if not missing:
        return rows
    nothing = torch.full_like(rows[0]["input_ids"], IGNORE)
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    return labelled + [{**rows[0], "labels": nothing}] * missing


def _texts(source: Texts) -> Iterable[Any]:
    if isinstance(source, str) and source == PYTHON_DOCS:
        return list(topics.values())
    if isinstance(source, str | PathLike):
        source = TextSource(os.fspath(source))
    if isinstance(source, datasets.Dataset):
        return _column(source, "text", "the data set")
    if not isinstance(source, TextSource):
        return source
    path = Path(source.path).expanduser()
    if path.suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
        options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        found = datasets.load_dataset(
            FORMATS[path.suffix], data_files=str(path), split=source.split, **options
        )
    else:
        name = str(path) if path.exists() else source.path
        found = datasets.load_dataset(name, source.name, split=source.split)
    return _column(found, source.column, source.path)


def _column(found: datasets.Dataset, column: str, name: str) -> Iterable[str]:
    if column not in found.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; it has: {', '.join(found.column_names)}"
        )
    texts: Iterable[str] = found[column]
    return texts


def _shuffled(texts: Iterable[Any], seed: int) -> Iterable[Any]:
    if not isinstance(texts, Sequence):
        return texts
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    return (texts[i] for i in order)


def _described(source: Evaluation) -> Any:
    if isinstance(source, Mapping):
        return {"sets": {name: _described(texts) for name, texts in source.items()}}
    if isinstance(source, TextSource):
        return asdict(source)
    if isinstance(source, PathLike):
        return os.fspath(source)
    if source is None or isinstance(source, str):
        return source
    return {"iterable": type(source).__name__}
