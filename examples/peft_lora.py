"""Train a LoRA adapter of peft on a pruned model, and merge it without losing zeros.

    pip install peft
    python examples/peft_lora.py MODEL TEXT_FILE OUTPUT

MODEL is dense or pruned; a dense one is pruned to 50 % first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from symprune_lightning import export_model, infer_masks, merge_adapters, prune_model


class LoRA(pl.LightningModule):
    """A causal language model with adapters; only these are trained."""

    def __init__(self, model: PreTrainedModel, rank: int = 8) -> None:
        super().__init__()
        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config)

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Return the mean cross-entropy."""
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for the adapters."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


def main(pretrained: str, file: str, output: str, *, length: int = 32, epochs: int = 2) -> float:
    """Prune, train, merge and write; return the largest part of a layer's change that is lost."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    ids = torch.tensor(tokenizer(Path(file).read_text("utf-8"))["input_ids"])
    rows = list(ids[: len(ids) // length * length].view(-1, length))
    loader: DataLoader[torch.Tensor] = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    if not infer_masks(model):
        prune_model(model, [{"input_ids": batch} for batch in loader], score="ria", sparsity=0.5)
    masks = infer_masks(model)

    module = LoRA(model)
    pl.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False).fit(module, loader)

    merged, lost = merge_adapters(module.model)  # peft's merge_and_unload() would fill the zeros
    assert infer_masks(merged) == masks
    assert isinstance(merged, PreTrainedModel)
    export_model(merged, output, tokenizer, settings={"fine-tuned": "LoRA, merged"})
    print(f"merged; of the adapters' change, {max(lost.values()):.0%} at most is on pruned weights")
    return max(lost.values())


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
