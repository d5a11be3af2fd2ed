"""Data module of batches that are ready for the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX, Processor
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.data.overlap import MAX_OVERLAP
from symprune_lightning.data.sources import source_settings

Batches = Iterable[Mapping[str, Tensor]] | Dataset[Mapping[str, Tensor]]
"""Batches that are passed to a model as keyword arguments."""


class BatchDataModule(CalibrationDataModule):
    """Yields calibration and evaluation batches that are ready for the model.

    For models whose inputs are not only text, such as ``pixel_values`` and ``input_features``. The
    batches are those that the model's processor returns, with ``return_tensors="pt"``, and
    optionally ``labels``; see ``TransformersModule``. They are read once and kept in memory, so
    that the dense and the pruned model are evaluated on the same batches. There are no training
    batches.

    Args:
        calibration: Calibration batches: an iterable of mappings of argument names to tensors, such
            as a list or a ``DataLoader``; or a ``Dataset`` whose items are batches.
        evaluation: Evaluation batches in the same form, or a mapping of names to several such sets,
            which are evaluated separately and together.
        processor: The processor that made the batches, or a tokenizer; saved with the pruned
            checkpoint. Default: ``None``.

    Raises:
        TypeError: ``processor`` is not an object with ``save_pretrained``.
        ValueError: In ``setup``, if there are no batches, a batch is not a mapping of names to
            tensors, or more than 30 % of the evaluation batches are calibration batches too.

    Examples:
        >>> batches = [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(4)]
        >>> data = BatchDataModule(batches[:3], evaluation=batches[3:])
        >>> next(iter(data.calibration_dataloader()))["pixel_values"].shape
        torch.Size([2, 3, 8, 8])
        >>> data.settings["calibration_batches"]
        3
    """

    def __init__(
        self,
        calibration: Batches,
        evaluation: Batches | Mapping[str, Batches],
        processor: Processor | None = None,
    ) -> None:
        sets: Any = evaluation
        if isinstance(evaluation, Mapping):
            sets = {name: _iterable(part) for name, part in evaluation.items()}
        super().__init__(_iterable(calibration), evaluation=_iterable(sets))
        if processor is not None and not hasattr(processor, "save_pretrained"):
            raise TypeError(
                f"processor is a {type(processor).__name__}: pass the object that made the "
                f"batches, such as AutoProcessor.from_pretrained(name)"
            )
        self.processor = processor
        self._batches: dict[str, list[dict[str, Tensor]]] = {}

    @property
    def tokenizer(self) -> Any:
        """The processor, which is saved with the pruned checkpoint."""
        return self.processor

    def setup(self, stage: str | None = None) -> None:
        """Read all batches. Further calls do nothing."""
        if not self._batches:
            sources = {"calibration": self.dataset, **self._evaluation_sets()}
            self._batches = {split: read_batches(x, split) for split, x in sources.items()}
            check_common_batches(self._batches)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Raise ``ValueError``, since there are no training batches."""
        raise ValueError(
            "a BatchDataModule has no training batches: pass train_dataloaders= to fit in place of "
            "the data module, or define train_dataloader() in a subclass"
        )

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the batches of each split: names, dtypes, shapes and values."""
        self.setup()
        return {split: _hash_batches(batches) for split, batches in self._batches.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Types of the arguments, and hashes, as recorded in the manifest."""
        hashes = self.hashes
        counts = {split: len(batches) for split, batches in self._batches.items()}
        return {
            "dataset": {"iterable": type(self.dataset).__name__},
            "evaluation": source_settings(self.evaluation),
            "calibration_batches": counts.pop("calibration"),
            "evaluation_batches": sum(counts.values()),
            "processor": None if self.processor is None else type(self.processor).__name__,
            "sha256": hashes,
        }

    def _dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        self.setup()
        batches: Any = self._batches[split]
        if split in self._evaluation_sets():
            batches = _padded_batches(batches, self._num_replicas)
        return DataLoader(batches, batch_size=None)


def _iterable(batches: Any) -> Any:
    """Return an iterable over the items of a ``Dataset``; other values unchanged."""
    return DataLoader(batches, batch_size=None) if isinstance(batches, Dataset) else batches


def read_batches(source: Any, split: str) -> list[dict[str, Tensor]]:
    """Return batches as a list.

    Raises:
        ValueError: There are none, or one is not a mapping of names to tensors.
    """
    batches: list[dict[str, Tensor]] = []
    for i, batch in enumerate(source):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {i} for {split} is a {type(batch).__name__}: pass an iterable of mappings "
                f"of argument names to tensors, as a processor returns them"
            )
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name!r} in batch {i} for {split} is a {type(value).__name__}, not a tensor: "
                    f"call the processor with return_tensors='pt'"
                )
        batches.append(dict(batch))
    if not batches:
        raise ValueError(f"there are no batches for {split}: pass at least one")
    return batches


def _hash_batches(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for i, batch in enumerate(batches):
        for name, x in sorted(batch.items()):
            digest.update(f"{i} {name} {x.dtype} {tuple(x.shape)}".encode())
            flat = x.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_common_batches(splits: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> None:
    """Refuse evaluation batches that are calibration batches too."""
    calibration = {_hash_batches([batch]) for batch in splits["calibration"]}
    for split, batches in splits.items():
        common = sum(_hash_batches([batch]) in calibration for batch in batches)
        if split != "calibration" and common > MAX_OVERLAP * len(batches):
            raise ValueError(
                f"{common} of {len(batches)} batches for {split} are also used for calibration: "
                f"the pruned model would be evaluated on the data that it was fitted to; pass "
                f"other batches as evaluation="
            )


def _padded_batches(batches: list[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Append batches without any label until the number of batches is divisible by ``count``."""
    last = batches[-1]
    labelled = next((k for k in ("labels", "decoder_input_ids", "input_ids") if k in last), None)
    if labelled is not None:
        last = {**last, "labels": torch.full_like(last[labelled], IGNORE_INDEX)}
    return batches + [last] * (-len(batches) % count)
