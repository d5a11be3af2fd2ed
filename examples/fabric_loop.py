"""Prune and fine-tune in a training loop of one's own with Lightning Fabric.

python examples/fabric_loop.py MODEL TEXT_FILE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from symprune_lightning import Communicator, apply_masks, export_model, prune_model


def main(pretrained: str, file: str, output: str, *, length: int = 32, **settings: Any) -> Any:
    """Prune, fine-tune for one epoch and write; return the result of pruning."""
    fabric = Fabric(**settings)
    fabric.launch()
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = fabric.setup(model, optimizer)
    ids = torch.tensor(tokenizer(Path(file).read_text("utf-8"))["input_ids"])
    rows = list(ids[: len(ids) // length * length].view(-1, length))
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=4))  # type: ignore[arg-type]

    # each rank calibrates on its own batches; the communicator sums over ranks: equal masks
    batches = [{"input_ids": batch} for batch in loader]
    communicator = Communicator.from_default_group()
    result = prune_model(model, batches, score="ria", sparsity=0.5, communicator=communicator)

    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        apply_masks(model.module, result.masks)  # the optimizer changes pruned weights, too
    assert result.is_applied_to(model.module)
    export_model(model, output, tokenizer)
    fabric.print(f"sparsity {result.sparsity:.4f}")
    return result


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
