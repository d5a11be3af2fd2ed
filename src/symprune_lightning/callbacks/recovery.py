"""Training of a pruned model by ``Trainer.prune``: callbacks and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from symprune_lightning.callbacks.finetuning import MaskedFinetuning
from symprune_lightning.engine.differences import fingerprint_differences
from symprune_lightning.engine.files import write_json
from symprune_lightning.errors import JournalError
from symprune_lightning.functional.packing import PackedMasks

RECOVERY, CHECKPOINT = "recovery", "last.ckpt"
"""Folder and file of the checkpoints of a training that Trainer.prune runs."""

CHECKPOINT_STEPS = 50
"""Number of training steps between them."""


def recovery_callbacks(masks: PackedMasks, folder: Path | None) -> list[Callback]:
    """Return callbacks that keep zeros while a pruned model is trained, and save checkpoints.

    Args:
        masks: The masks.
        folder: Where to save checkpoints; ``None`` saves none.
    """
    callbacks: list[Callback] = [MaskedFinetuning(masks)]
    if folder is not None:
        saver = ModelCheckpoint(
            folder / RECOVERY,
            filename=Path(CHECKPOINT).stem,
            every_n_train_steps=CHECKPOINT_STEPS,
            enable_version_counter=False,
        )
        callbacks.append(saver)
    return callbacks


def recovery_checkpoint(trainer: Trainer, folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint from which an interrupted training resumes, if there is one.

    Args:
        trainer: The Trainer; every rank must call this.
        folder: See ``recovery_callbacks``.
        settings: What must agree for the training to be resumed, as JSON values; recorded next to
            the checkpoints.

    Raises:
        JournalError: The checkpoint belongs to another training.
    """
    checkpoint, record = folder / RECOVERY / CHECKPOINT, folder / "training.json"
    current: dict[str, Any] = json.loads(json.dumps(settings))  # JSON has no tuples
    if checkpoint.exists():
        recorded = json.loads(record.read_text("utf-8")) if record.is_file() else {}
        differences = list(fingerprint_differences(recorded, current))
        if differences:
            raise JournalError(
                f"{checkpoint.parent} has a checkpoint of another training: "
                f"{'; '.join(differences)}. Use the same settings to resume it, or delete the "
                f"folder to start over"
            )
        return checkpoint
    if trainer.is_global_zero:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, current)
    return None
