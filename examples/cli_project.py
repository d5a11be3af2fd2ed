"""A LightningCLI project of somebody's own, which is pruned by its YAML alone.

python examples/cli_project.py fit --config examples/cli_project.yaml
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader


class Digits(LightningModule):
    """A small classifier."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def calibration_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """How SymPrune sends a batch through: needed where forward does not take a whole batch."""
        logits: torch.Tensor = self(batch[0])
        return logits


class Data(LightningDataModule):
    """Points of ten classes."""

    def train_dataloader(self) -> Iterable[list[torch.Tensor]]:
        """Batches of points and classes."""
        random = torch.Generator().manual_seed(0)
        classes = torch.randint(10, (512,), generator=random)
        points = torch.randn(10, 32, generator=random)[classes]
        points = points + 0.3 * torch.randn(512, 32, generator=random)
        return DataLoader(list(zip(points, classes, strict=True)), batch_size=32)  # type: ignore[arg-type]

    def calibration_dataloader(self) -> Iterable[list[torch.Tensor]]:
        """What SymPrune calibrates on."""
        return self.train_dataloader()


def main(args: list[str] | None = None) -> LightningCLI:
    """The project's command line."""
    return LightningCLI(Digits, Data, args=args, save_config_callback=None)


if __name__ == "__main__":
    main()
