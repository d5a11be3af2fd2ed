"""Prune a model, fine-tune it at fixed sparsity, and write the checkpoint.

    python examples/prune_finetune_export.py MODEL OUTPUT [--steps 30] [--strategy ddp --devices 2]

MODEL is a hub name, a local folder, or a .gguf file. With --strategy fsdp2 the model is sharded.
The texts are the manual of the standard library; pass your own dataset to CalibrationDataModule.
"""

from __future__ import annotations

import argparse

from lightning.pytorch.strategies import ModelParallelStrategy

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    MaskedFinetuning,
    SymPrune,
    Trainer,
    export_model,
)


def main() -> None:
    """Prune, fine-tune, and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--strategy", default="auto", choices=["auto", "ddp", "fsdp2"])
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()

    data = CalibrationDataModule(
        "python-docs",
        tokenizer=options.model,
        sequences=16,
        evaluation_sequences=24,
        training_sequences=options.steps * options.devices,
        sequence_length=options.length,
    )
    module = CausalLMModule(options.model, dtype="float32", learning_rate=5e-5)
    sharded = ModelParallelStrategy(options.devices, 1)
    trainer = Trainer(
        max_steps=options.steps,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        strategy=sharded if options.strategy == "fsdp2" else options.strategy,
        devices=options.devices,
        logger=False,
        enable_checkpointing=False,
    )
    prune = SymPrune("ria", sparsity=options.sparsity, refine="exactswap")
    trainer.validate(module, datamodule=data, callbacks=prune, verbose=False)
    trainer.fit(module, datamodule=data, callbacks=MaskedFinetuning())
    trainer.validate(module, datamodule=data, verbose=False)
    finetuned = float(trainer.callback_metrics["val_perplexity"])

    zeros_kept = prune.result is not None and prune.result.is_applied_to(module.prunable_model)
    export_model(
        module.prunable_model,
        options.output,
        data.tokenizer,
        settings={**prune.settings, "fine-tuned": f"{options.steps} steps of AdamW"},
        metrics={"val_perplexity": finetuned},
    )
    if trainer.is_global_zero:
        dense, sparse = prune.dense_metrics, prune.sparse_metrics
        print(f"dense {dense['val_perplexity']:.2f}, pruned {sparse['val_perplexity']:.2f}", end="")
        print(f", fine-tuned {finetuned:.2f}; pruned weights are still zero: {zeros_kept}")


if __name__ == "__main__":
    main()
