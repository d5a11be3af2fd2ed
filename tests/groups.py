"""Real process groups on gloo, for tests of what several processes do together."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def run_group(worker: Callable[..., None], size: int, folder: Path, *args: Any) -> None:
    """Call ``worker(rank, size, folder, *args)`` in that many processes of one group.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A worker has failed.
    """
    multiprocessing.spawn(_join, args=(worker, size, folder, args), nprocs=size)


def _join(
    rank: int, worker: Callable[..., None], size: int, folder: Path, args: tuple[Any, ...]
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    try:
        worker(rank, size, folder, *args)
    finally:
        dist.destroy_process_group()
