"""Perplexity and cost of block reconstruction, and of distillation after it.

    python benchmarks/recovery.py MODEL --csv docs/recovery.csv [--sparsities 0.5 0.6] [--steps 300]
    python benchmarks/recovery.py MODEL --csv docs/recovery.csv --text english --dataset FILE.jsonl

RIA, ExactSwap, MaskedCG and Sensitivity, then reconstruction of every block with the defaults, from
32 x 512 tokens; evaluated on 24 x 512 tokens of other documents. With ``--steps``, distillation of
that many steps on 96 further sequences. Cost is the time for pruning divided by that of a plain
forward over the same calibration sequences in the same process. Run it on an idle machine. Every
run appends a row to the CSV file. Nothing is tuned on the evaluation text.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch import Callback, LightningModule

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    Distillation,
    SymPrune,
    Trainer,
)
from tables import QUIET_TRAINER, append_row
from timing import forward_seconds


class Perplexities(Callback):
    """Records the perplexity of every evaluation."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LightningModule) -> None:
        """Record the perplexity."""
        self.values.append(float(trainer.callback_metrics["val_perplexity"]))


def run(options: argparse.Namespace, sparsity: float) -> dict[str, object]:
    """Prune, reconstruct and, if requested, distil; return the row."""
    data = CalibrationDataModule(
        options.dataset,
        options.model,
        sequences=32,
        sequence_length=512,
        evaluation_sequences=24,
        training_sequences=96 if options.steps else 0,
        batch_size=1,
    )
    module = CausalLMModule(
        options.model, dtype="float32", learning_rate=1e-4, lr_schedule="cosine"
    )
    module.configure_model()
    forward = forward_seconds(module, data)
    prune = SymPrune(
        score="ria",
        sparsity=sparsity,
        refine="exactswap",
        update="maskedcg",
        allocation="sensitivity",
        gradient_batches=16,
        calibration_order="block",
        reconstruct=True,
    )
    perplexities = Perplexities()
    trainer = Trainer(
        max_steps=options.steps or -1,
        callbacks=[prune, perplexities, *([Distillation()] if options.steps else [])],
        **QUIET_TRAINER,
    )
    result = trainer.prune(module, datamodule=data)
    dense, reconstructed, *distilled = perplexities.values
    improved = [report.error_reconstructed < report.error for report in result.blocks]
    return {
        "text": options.text,
        "sparsity": result.sparsity,
        "steps": options.steps,
        "dense": dense,
        "reconstructed": reconstructed,
        "distilled": distilled[0] if distilled else "",
        "forward_seconds": forward,
        "forwards": prune.seconds / forward,
        "blocks": len(improved),
        "blocks_improved": sum(improved),
        "zeros_kept": result.is_applied_to(module.prunable_model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--csv", type=Path, default=Path("recovery.csv"))
    parser.add_argument("--text", default="python-docs", help="name of the text in the CSV file")
    parser.add_argument("--dataset", default="python-docs", help="the text, such as a .jsonl file")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--steps", type=int, default=0, help="steps of the distillation")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for sparsity in options.sparsities:
        row = run(options, sparsity)
        append_row(options.csv, list(row), list(row.values()))


if __name__ == "__main__":
    main()
