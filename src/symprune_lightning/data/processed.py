"""Data module of images, sounds and chats, which a processor turns into batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX, Processor, load_processor
from symprune_lightning.data.batches import BatchDataModule, check_common_batches, read_batches
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

PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
"""Attributes of processors: ids of the tokens that stand for parts of an image or a sound."""

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
    - ``messages``: chats with images or sounds, for the processor's chat template.

    Labels are the transcription, or the text without the tokens that stand for images or sounds.

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
        seed: Seed of the shuffle. Iterables that are not sequences keep their order. Default: 0.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        ValueError: In ``setup``, if there are not enough rows, a column is missing, or the
            processor cannot process a row.

    Examples:
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
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        if isinstance(processor, str):
            processor = load_processor(processor, trust_remote_code=trust_remote_code)
        super().__init__(dataset, evaluation, processor)  # type: ignore[arg-type]
        for name, size in (("samples", samples), ("evaluation_samples", evaluation_samples)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, but got {size}")
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
        names = ("columns", "samples", "evaluation_samples", "batch_size", "seed")
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
        taken = list(islice(rows, count))
        if len(taken) < count:
            raise ValueError(
                f"there are not enough rows for {split}: {count} are needed, and {name} has only "
                f"{len(taken)} more; use fewer samples, or more rows"
            )
        chunks = (taken[i : i + self.batch_size] for i in range(0, count, self.batch_size))
        return read_batches((self._batch(chunk, name) for chunk in chunks), split)

    def _batch(self, rows: Sequence[tuple[int, Any]], name: str) -> dict[str, Any]:
        arguments: dict[str, list[Any]] = {}
        for number, row in rows:
            for argument, column in self._columns_of(row, number, name).items():
                arguments.setdefault(argument, []).append(row[column])
        try:
            return process(self.processor, arguments)
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


def process(processor: Any, arguments: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return a batch, with labels if there is text.

    Args:
        processor: The processor.
        arguments: Its arguments, each a list with one value per row.
    """
    if "messages" in arguments:
        options = {"tokenize": True, "return_dict": True, "padding": True}
        batch = processor.apply_chat_template(arguments["messages"], return_tensors="pt", **options)
        return _with_labels(processor, dict(batch))
    inputs: dict[str, Any] = dict(arguments)
    if "audio" in inputs:
        sounds, rates = zip(*map(_decoded, inputs["audio"]), strict=True)
        inputs |= {"audio": list(sounds), "sampling_rate": rates[0]}
        if "text" in inputs and getattr(processor, "audio_token", None) is None:
            return _transcribed(processor, inputs)
    if "text" in inputs:
        inputs["padding"] = True
    return _with_labels(processor, dict(processor(**inputs, return_tensors="pt")))


def _decoded(sound: Any) -> tuple[Any, int]:
    """Return the samples and the sampling rate of a sound that ``datasets`` has decoded."""
    if isinstance(sound, Mapping):
        return torch.as_tensor(sound["array"]).float().numpy(), int(sound["sampling_rate"])
    samples = sound.get_all_samples()  # of torchcodec
    return samples.data.mean(0).numpy(), int(samples.sample_rate)


def _transcribed(processor: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return features of sounds, and their transcriptions as labels."""
    # features are padded as the processor does by default: to the length that the model needs
    text = inputs.pop("text")
    tokens = processor.tokenizer(text, padding=True, return_tensors="pt")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORE_INDEX)
    return {**processor(**inputs, return_tensors="pt"), "labels": labels}


def _with_labels(processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Add the labels of text: all tokens but padding and those of images and sounds."""
    if "input_ids" not in batch:
        return batch
    ids = batch["input_ids"]
    ignored = batch["attention_mask"] == 0
    for attribute in PLACEHOLDERS:
        token = getattr(processor, attribute, None)
        if token is not None:
            ignored = ignored | (ids == token)
    return {**batch, "labels": ids.masked_fill(ignored, IGNORE_INDEX)}
