"""Prune and fine-tune with the Trainer of transformers: a callback that keeps zeros.

python examples/transformers_trainer.py MODEL TEXT_FILE OUTPUT
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from symprune_lightning import apply_masks, export_model, prune_model


class KeepZeros(TrainerCallback):
    """Zeroes the pruned weights after every step of the optimizer."""

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        self.masks = masks

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the pruned weights."""
        apply_masks(kwargs["model"], self.masks)


def main(pretrained: str, file: str, output: str, *, length: int = 32, steps: int = 10) -> Any:
    """Prune, fine-tune and write; return the result of pruning."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    ids = torch.tensor(tokenizer(Path(file).read_text("utf-8"))["input_ids"])
    sequences = ids[: len(ids) // length * length].view(-1, length)
    batches = [{"input_ids": part} for part in torch.split(sequences, 4)]
    result = prune_model(model, batches, score="ria", sparsity=0.5)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(Path(output).with_name("trainer")),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in sequences],
        callbacks=[KeepZeros(result.masks)],
    )
    trainer.train()
    assert result.is_applied_to(model)
    export_model(model, output, tokenizer)
    print(f"sparsity {result.sparsity:.4f} after {steps} steps")
    return result


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
