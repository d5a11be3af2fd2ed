"""Real process groups on gloo, for tests of what several processes do together."""

from __future__ import annotations

import os
import socket
import sys
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


def run_trainers(worker: Callable[..., None], size: int, folder: Path, *args: Any) -> None:
    """The same for workers that make Trainers: with the environment that torchrun makes.

    ``Trainer(devices=size)`` then takes part in the run, and makes the process group itself.
    """
    multiprocessing.spawn(_launch, args=(worker, size, free_port(), folder, args), nprocs=size)


def free_port() -> int:
    """Return a port of this machine that is free at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _launch(
    rank: int,
    worker: Callable[..., None],
    size: int,
    port: int,
    folder: Path,
    args: tuple[Any, ...],
) -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    worker(rank, size, folder, *args)
    _leave()


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
    worker(rank, size, folder, *args)
    _leave()


def _leave() -> None:
    """End the process before the interpreter cleans up, where gloo at times aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
