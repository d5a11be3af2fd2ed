"""Trainers, modules and data for tests of callbacks, and an observer that records its calls."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from symprune_lightning import CalibrationDataModule, CausalLMModule, PruningHooks, Trainer
from tests.models import build
from tests.texts import texts, tokenizer


def quiet_trainer(cls: type[pl.Trainer] = Trainer, **options: Any) -> Any:
    return cls(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def text_data(**options: Any) -> CalibrationDataModule:
    sizes = {"sequences": 6, "sequence_length": 16, "evaluation_sequences": 5, "batch_size": 2}
    return CalibrationDataModule(texts(), tokenizer(), **{**sizes, **options})


def language_module() -> CausalLMModule:
    return CausalLMModule(build("llama"), learning_rate=1e-2)


class Regression(pl.LightningModule):
    """A user's own module without ``calibration_step``; its batches are tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader:
    return DataLoader(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)


def sparsity(module: Regression) -> float:
    return float((module.net[0].weight == 0).float().mean())


class HookRecorder(pl.Callback, PruningHooks):
    """Records the calls of all pruning hooks, and when an evaluation starts and ends.

    Attributes:
        calls: Hook names and arguments, in the order of the calls.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    @property
    def names(self) -> list[str]:
        """Names of the hooks that were called, in order."""
        return [name for name, _ in self.calls]

    def arguments(self, name: str) -> list[Any]:
        """Arguments of all calls of one hook."""
        return [arguments for other, arguments in self.calls if other == name]

    def on_validation_epoch_start(self, trainer, pl_module):
        self.calls.append(("on_validation_epoch_start", ()))

    def on_validation_end(self, trainer, pl_module):
        self.calls.append(("on_validation_end", ()))


def _recording(name: str) -> Any:
    def hook(self: HookRecorder, *arguments: Any) -> None:
        self.calls.append((name, arguments))

    return hook


for _name in vars(PruningHooks):
    if _name.startswith("on_"):
        setattr(HookRecorder, _name, _recording(_name))


def assert_records_the_run(recorder: HookRecorder, layers, result) -> None:
    """Check the arguments of the hooks that every run calls."""
    assert recorder.arguments("on_pruning_start") == [(layers,)]
    scored = recorder.arguments("on_layer_scored")
    pruned = recorder.arguments("on_layer_pruned")
    assert [name for name, _, _ in scored] == [report.name for report in result.layers]
    assert [report for report, _ in pruned] == result.layers
    for (name, scores, initial), (report, mask) in zip(scored, pruned, strict=True):
        assert scores.shape == initial.shape == mask.shape == report.shape
        assert initial.dtype == mask.dtype == torch.bool
        lowest_kept = scores.masked_fill(~initial, torch.inf).amin(1)
        assert (lowest_kept >= scores.masked_fill(initial, -torch.inf).amax(1)).all()
        assert torch.equal(mask, result.masks[name])
        assert int((mask & ~initial).sum()) == report.swaps
    ((ended,),) = recorder.arguments("on_pruning_end")
    assert ended is result
