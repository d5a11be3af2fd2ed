"""Data module of images, sounds and chats, which a processor turns into batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from symprune_lightning.checkpoints.pretrained import Processor, load_processor
from symprune_lightning.data.batches import BatchDataModule, check_common_batches, read_batches
from symprune_lightning.data.datamodule import check_positive
from symprune_lightning.data.processing import process
from symprune_lightning.data.reader import check_one_split, shuffled
from symprune_lightning.data.sources import source_settings
from symprune_lightning.data.texts import TextSource

COLUMNS = {
    "image": "images",
    "images": "images",
    "audio": "audio",
    "text": "text",
    "messages": "messages",
}
"""Arguments of processors by the usual names of columns; ``messages`` are for chat templates."""

Rows = TextSource | str | Iterable[Mapping[str, Any]] | Path
"""Rows: a dataset, where to load one, or an iterable of mappings of columns to values."""


class ProcessorDataModule(BatchDataModule):
    """Turns rows of images, sounds and texts into batches by the model's processor.

    For vision-language models, speech models and vision transformers; see ``TransformersModule``.
    Rows are shuffled, processed once in batches, and kept in memory; no row is in two splits.
    Columns become arguments of the processor:

    - ``image`` or ``images``, with ``text`` or alone;
    - ``audio``, arrays with their sampling rate as ``datasets`` decodes them, with ``text``: the
      transcription, or the prompt of a processor with an audio token;
    - ``messages``: chats for the processor's chat template. Images and sounds are in their content,
      or in columns of their own, in the order of the blocks that have none.

    Labels are the transcription, or the text without the tokens that stand for images or sounds.
    Where the text is the input of an encoder, they would be meaningless: use ``labels=False``.

    Args:
        dataset: A ``datasets.Dataset``, a hub name, a local folder or file, a ``TextSource`` (whose
            column is not used), or an iterable of mappings.
        processor: The processor, or the name of its model.
        columns: Columns of the dataset by argument of the processor, such as ``{"images": "photo",
            "text": "caption"}``. Default: ``None``, the columns above that there are.
        samples: Number of calibration rows. Default: 128.
        evaluation: Evaluation rows, in any form that ``dataset`` accepts, or a mapping of names to
            several such sets. Default: ``None``, further rows of ``dataset``.
        evaluation_samples: Number of evaluation rows, per set if there are several. Default: 64.
        batch_size: Number of rows per batch. Default: 1.
        labels: Whether batches of text have labels, of which the perplexity is computed. Default:
            ``True``; use ``False`` for models that do not generate text.
        seed: Seed of the shuffle. Iterables that are not sequences keep their order. Default: 0.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        ValueError: In ``setup``, if there are not enough rows, a column is missing, or the
            processor cannot process a row.

    Examples:
        >>> import torch
        >>> from transformers import CLIPImageProcessor
        >>> rows = [{"image": torch.rand(3, 8, 8)} for _ in range(4)]
        >>> processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8, do_rescale=False)
        >>> data = ProcessorDataModule(rows, processor, samples=3, evaluation_samples=1)
        >>> next(iter(data.calibration_dataloader()))["pixel_values"].shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        dataset: Rows,
        processor: Processor | str,
        *,
        columns: Mapping[str, str] | None = None,
        samples: int = 128,
        evaluation: Rows | Mapping[str, Rows] | None = None,
        evaluation_samples: int = 64,
        batch_size: int = 1,
        labels: bool = True,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        if isinstance(processor, str):
            processor = load_processor(processor, trust_remote_code=trust_remote_code)
        super().__init__([], [], processor)
        # streams are no batches, which the base class would load
        self.dataset, self.evaluation = dataset, evaluation
        self._check_sources()
        sizes = {
            "samples": samples,
            "evaluation_samples": evaluation_samples,
            "batch_size": batch_size,
        }
        check_positive(sizes)
        self.labels = labels
        self.columns = None if columns is None else dict(columns)
        self.samples = samples
        self.evaluation_samples = evaluation_samples
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Process all rows. Further calls do nothing."""
        if self._batches:
            return
        rows, name = self._rows(self.dataset, "the dataset")
        batches = {"calibration": self._processed(rows, self.samples, name, "calibration")}
        for split, source in self._evaluation_sets().items():
            own, own_name = (rows, name) if source is None else self._rows(source, split)
            batches[split] = self._processed(own, self.evaluation_samples, own_name, split)
        check_common_batches(batches)
        self._batches = batches

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments and hashes, as recorded in the manifest."""
        names = ("columns", "samples", "evaluation_samples", "batch_size", "labels", "seed")
        dataset = {"iterable": type(self).__name__, "rows": source_settings(self.dataset)}
        return {**super().settings, "dataset": dataset, **{n: getattr(self, n) for n in names}}

    def _rows(self, source: Any, name: str) -> tuple[Iterator[tuple[int, Any]], str]:
        """Return the rows of a source with their numbers, and its name in messages."""
        if isinstance(source, str | PathLike):
            source = TextSource(os.fspath(source))
        if isinstance(source, TextSource):
            source, name = source.load(), source.path
        check_one_split(source, name)
        return shuffled(source, self.seed), name

    def _processed(
        self, rows: Iterator[tuple[int, Any]], count: int, name: str, split: str
    ) -> list[dict[str, Tensor]]:
        batches, num_read = [], 0
        while num_read < count:  # decoded rows take far more memory than processed ones
            chunk = list(islice(rows, min(self.batch_size, count - num_read)))
            if not chunk:
                raise ValueError(
                    f"there are not enough rows for {split}: {count} are needed, and {name} has "
                    f"only {num_read} more; use fewer samples, or more rows"
                )
            num_read += len(chunk)
            batches.append(self._batch(chunk, name))
        return read_batches(batches, split)

    def _batch(self, rows: Sequence[tuple[int, Any]], name: str) -> dict[str, Any]:
        columns = [self._columns_of(row, number, name) for number, row in rows]
        for (number, _), others in zip(rows, columns, strict=True):
            if others != columns[0]:
                raise ValueError(
                    f"row {number} of {name} has the columns {', '.join(others.values())}, and row "
                    f"{rows[0][0]} has {', '.join(columns[0].values())}: use batch_size=1"
                )
        arguments = {
            argument: [row[column] for _, row in rows] for argument, column in columns[0].items()
        }
        try:
            batch = process(self.processor, arguments)
            return batch if self.labels else {k: x for k, x in batch.items() if k != "labels"}
        except Exception as error:  # raised by the processor or by a chat template
            numbers = ", ".join(str(number) for number, _ in rows)
            raise ValueError(
                f"{type(self.processor).__name__} cannot process rows {numbers} of {name}, with "
                f"the arguments {', '.join(arguments)}: {error}"
            ) from error

    def _columns_of(self, row: Any, number: int, name: str) -> Mapping[str, str]:
        """Return the columns of a row by argument of the processor."""
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} of {name} is a {type(row).__name__}: pass mappings of columns to "
                f"values"
            )
        if self.columns is None:
            found = {COLUMNS[column]: column for column in row if column in COLUMNS}
            if "messages" in found:
                found.pop("text", None)  # the chat has its own text
        else:
            found = {k: column for k, column in self.columns.items() if column in row}
        missing = set(self.columns or ()) - set(found)
        if missing or not found:
            expected = ", ".join((self.columns or {}).values()) or ", ".join(COLUMNS)
            raise ValueError(
                f"row {number} of {name} has the columns {', '.join(map(str, row))}, and not "
                f"{expected}: name them, such as columns={{'images': 'photo', 'text': 'caption'}}"
            )
        return found
