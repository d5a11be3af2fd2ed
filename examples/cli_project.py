"""An existing LightningCLI project that is pruned by changes to its YAML file only.

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
        """Return the logits of points."""
        logits: torch.Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def calibration_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Run a calibration batch; needed because ``forward`` does not accept a batch."""
        logits: torch.Tensor = self(batch[0])
        return logits


class Data(LightningDataModule):
    """Noisy points of ten classes."""

    def train_dataloader(self) -> Iterable[list[torch.Tensor]]:
        """Return batches of points and classes."""
        generator = torch.Generator().manual_seed(0)
        classes = torch.randint(10, (512,), generator=generator)
        points = torch.randn(10, 32, generator=generator)[classes]
        points = points + 0.3 * torch.randn(512, 32, generator=generator)
        return DataLoader(list(zip(points, classes, strict=True)), batch_size=32)  # type: ignore[arg-type]

    def calibration_dataloader(self) -> Iterable[list[torch.Tensor]]:
        """Return the batches that SymPrune calibrates on."""
        return self.train_dataloader()


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the command line of the project."""
    return LightningCLI(Digits, Data, args=args, save_config_callback=None)


if __name__ == "__main__":
    main()
