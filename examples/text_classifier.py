"""A text classifier in the style of Lightning's tutorials, pruned before its first step.

    python examples/text_classifier.py MODEL TEXTS.tsv OUTPUT

MODEL is a folder or hub name of an encoder or decoder; each line of TEXTS.tsv is a label (0 or 1),
a tab, and a text. ModelCheckpoint, EarlyStopping, LearningRateMonitor and two loggers see the
pruned model. The classification head is not pruned.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from symprune_lightning import MaskedFinetuning, SymPrune

Batch = dict[str, torch.Tensor]


class Texts(pl.LightningDataModule):
    """Labelled texts; every fourth is for validation."""

    def __init__(self, pretrained: str, file: str, batch_size: int = 8) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.batch_size = batch_size
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        self.rows = [line.split("\t", maxsplit=1) for line in lines]

    def _loader(self, rows: list[list[str]], shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            rows,  # type: ignore[arg-type]
            self.batch_size,
            shuffle=shuffle,
            collate_fn=self._collate,
        )

    def _collate(self, rows: list[list[str]]) -> Batch:
        texts = [text for _, text in rows]
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        labels = torch.tensor([int(label) for label, _ in rows])
        names = ("input_ids", "attention_mask")
        return {**{name: batch[name] for name in names}, "labels": labels}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training texts."""
        return self._loader([x for i, x in enumerate(self.rows) if i % 4], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation texts."""
        return self._loader(self.rows[::4])

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Return the texts that SymPrune calibrates on, in a fixed order."""
        return self._loader([x for i, x in enumerate(self.rows) if i % 4])


class TextClassifier(pl.LightningModule):
    """A transformer with a classification head."""

    def __init__(self, pretrained: str, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=2)
        self.learning_rate = learning_rate
        self.accuracy = BinaryAccuracy()

    def forward(self, batch: Batch) -> Any:
        """Return loss and logits."""
        return self.model(**batch)

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss: torch.Tensor = self(batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        """Log loss and accuracy."""
        output = self(batch)
        self.accuracy(output.logits.argmax(-1), batch["labels"])
        self.log_dict({"val_loss": output.loss, "val_accuracy": self.accuracy}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a cosine schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def main(pretrained: str, file: str, output: str, *, epochs: int = 3) -> pl.Trainer:
    """Prune and train; return the Trainer."""
    best = ModelCheckpoint(monitor="val_loss", dirpath=Path(output, "checkpoints"))
    trainer = pl.Trainer(
        max_epochs=epochs,
        default_root_dir=output,
        logger=[CSVLogger(output), TensorBoardLogger(output)],
        log_every_n_steps=1,
        callbacks=[
            SymPrune("wanda", sparsity=0.5, when="fit_start"),
            MaskedFinetuning(),
            best,
            EarlyStopping("val_loss", patience=3),
            LearningRateMonitor(),
        ],
    )
    data = Texts(pretrained, file)
    trainer.fit(TextClassifier(pretrained), data)
    print(f"best checkpoint: {best.best_model_path}, {dict(trainer.callback_metrics)}")
    return trainer


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
