"""An existing Lightning project, and the three lines that prune it.

    python examples/own_project.py MODEL_FOLDER TEXT_FILE

Only the lines marked with (1), (2) and (3) were added.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from symprune_lightning import MaskedFinetuning, SymPrune  # (1)


class Project(pl.LightningModule):
    """A module of the user around a language model."""

    def __init__(self, folder: str, learning_rate: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_pretrained(folder).train()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood per token, in nats."""
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss: torch.Tensor = self(ids)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with weight decay."""
        learning_rate = self.hparams["learning_rate"]
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.1)


def main(folder: str, texts: str) -> Project:
    """Fine-tune on a text file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(Path(texts).read_text("utf-8"))["input_ids"])
    rows = list(ids[: len(ids) // 32 * 32].view(-1, 32))
    loader: DataLoader[torch.Tensor] = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]

    callbacks: list[pl.Callback] = []
    callbacks += [SymPrune("ria", sparsity=0.5, when="fit_start", calibration=loader)]  # (2)
    callbacks += [MaskedFinetuning()]  # (3)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False
    )
    project = Project(folder)
    trainer.fit(project, loader)
    return project


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
