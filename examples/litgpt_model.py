"""A model of litgpt in a LightningModule, pruned and fine-tuned by Lightning's Trainer.

    pip install litgpt
    python examples/litgpt_model.py pythia-14m TEXT_FILE

The first argument is a name of litgpt's configurations; the model starts with random weights,
unless ``checkpoint_dir`` is set. Tokens are the bytes of the file: no tokenizer is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader

from symprune_lightning import MaskedFinetuning, SymPrune


class LitGPT(pl.LightningModule):
    """A GPT of litgpt that is trained on token ids."""

    def __init__(self, config: Config, checkpoint_dir: str | None = None) -> None:
        super().__init__()
        self.model = GPT(config)
        if checkpoint_dir is not None:
            weights = torch.load(Path(checkpoint_dir, "lit_model.pth"), weights_only=True)
            self.model.load_state_dict(weights)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.model(ids)
        return logits

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Return the mean cross-entropy of the next tokens."""
        logits = self(ids)
        loss: torch.Tensor = chunked_cross_entropy(logits[:, :-1], ids[:, 1:], chunk_size=0)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(config: str | Config, file: str, *, length: int = 64, steps: int = 20) -> LitGPT:
    """Prune to 50 % and fine-tune on a file; return the module."""
    data = torch.tensor(list(Path(file).read_bytes()))
    rows = list(data[: len(data) // length * length].view(-1, length))
    loader: DataLoader[torch.Tensor] = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    module = LitGPT(Config.from_name(config) if isinstance(config, str) else config)
    # `calibration_order="layer"`, the default, needs one forward. Layers have litgpt's names:
    # transformer.h.0.attn.qkv, …; lm_head is left dense.
    prune = SymPrune("ria", sparsity=0.5, when="fit_start", calibration=loader)
    trainer = pl.Trainer(
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        callbacks=[prune, MaskedFinetuning()],
    )
    trainer.fit(module, loader)
    assert prune.result is not None
    print(f"sparsity {prune.result.sparsity:.4f} in {len(prune.result.layers)} layers")
    return module


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
