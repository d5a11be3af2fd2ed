"""Time of a plain forward, the unit of the costs of pruning."""

from __future__ import annotations

import time

import torch

from symprune_lightning import CalibrationDataModule, CausalLMModule


@torch.no_grad()
def forward_seconds(module: CausalLMModule, data: CalibrationDataModule) -> float:
    """Return the faster of two plain forwards over the calibration sequences."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        for batch in data.calibration_dataloader():
            module(batch)
        times.append(time.perf_counter() - start)
    return min(times)
