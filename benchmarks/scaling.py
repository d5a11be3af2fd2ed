"""Scaling to two processes: one process with one thread against two with one thread each.

    python benchmarks/scaling.py MODEL [--sequences 32] [--length 512] [--rounds 1]

MODEL is any model that CausalLMModule accepts. Each run is a separate gloo process group; the time
of ``prune_model`` on a model in memory is measured, from a barrier to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from cost import forward
from symprune_lightning import CalibrationDataModule, Communicator, ExactSwap, prune_model
from symprune_lightning.checkpoints.pretrained import load_model
from tables import median_and_range, section

FORWARD = "forward"
"""Plain forwards of each process's share of the batches: a bound on what pruning can gain."""
METHODS: dict[str, dict[str, Any]] = {
    "RIA": {"score": "ria"},
    "RIA + ExactSwap": {"score": "ria", "refine": ExactSwap()},
}


def work(rank: int, size: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    model = load_model(options.model, dtype="float32")
    data = CalibrationDataModule(
        "python-docs",
        options.model,
        sequences=options.sequences,
        sequence_length=options.length,
        evaluation_sequences=1,
        batch_size=4,
    )
    batches = list(data.calibration_dataloader())
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    communicator = Communicator.from_default_group()
    share = list(communicator.shard(batches))
    forward(model, share[:1])
    times = {}
    for name in (FORWARD, *options.methods):
        model.load_state_dict(dense)
        distributed.barrier()
        start = time.perf_counter()
        if name == FORWARD:
            forward(model.base_model, share)
            distributed.barrier()
        else:
            prune_model(model, share, communicator=communicator, **METHODS[name])
        times[name] = time.perf_counter() - start
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    distributed.barrier()
    os._exit(0)


def times_of(size: int, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(size, folder, options), nprocs=size)  # type: ignore[attr-defined,no-untyped-call]
        times: dict[str, float] = json.loads((Path(folder) / "times.json").read_text())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    for option, default in (("sequences", 32), ("length", 512), ("rounds", 1)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    runs = [(times_of(1, options), times_of(2, options)) for _ in range(options.rounds)]
    section(
        "Processes",
        f"`benchmarks/scaling.py`: SmolLM2-135M-Instruct, {options.sequences} × {options.length} "
        f"tokens, float32, one thread per process, gloo; medians of {options.rounds} round(s). "
        f"*Forward* is the forward of each process's share without the output projection: what "
        f"two processes gain on this machine before any pruning.",
        ("method", "1 process, s", "2 processes, s", "× faster", "range"),
        [row(name, runs) for name in (FORWARD, *options.methods)],
    )


def row(name: str, runs: list[tuple[dict[str, float], dict[str, float]]]) -> list[str]:
    one, two = ([run[i][name] for run in runs] for i in (0, 1))
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    return [
        name,
        f"{statistics.median(one):.1f}",
        f"{statistics.median(two):.1f}",
        *median_and_range(ratios),
    ]


if __name__ == "__main__":
    main()
