"""Memory of pruning over that of a plain forward, against the formula that predicts it.

    python benchmarks/memory.py MODEL [--length 512] [--sequences 4 16 32]

MODEL is a folder (reading a GGUF file takes more memory than either). Each run is a process of its
own, on the CPU; what is told is the peak resident set after a plain forward of the same batches,
and after pruning by RIA. The formula, for a Llama-shaped model with the schedule ``layer``, in
bytes:

    tokens · b · (2 · hidden + intermediate)    the batches that wait inside a block: the residual
                                                stream, the normed input and the gate's output
  + weights pruned                              masks, a byte each
  + 4 · 5 · largest layer                       float32 copies while one layer is scored

where b is the bytes of a hidden value.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from symprune_lightning import CalibrationDataModule, prune_model
from symprune_lightning.engine.layers import prunable_layers
from symprune_lightning.pretrained import load_model


def run(options: argparse.Namespace, part: str, sequences: int) -> dict[str, float]:
    """A part in a process of its own."""
    command = [sys.executable, __file__, options.model, f"--part={part}"]
    command += [f"--length={options.length}", "--sequences", str(sequences)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def work(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a plain forward or of pruning, and what the formula says."""
    (sequences,) = options.sequences
    model: Any = load_model(options.model, dtype="float32")
    data = CalibrationDataModule(
        "python-docs",
        options.model,
        sequences=sequences,
        sequence_length=options.length,
        evaluation_sequences=1,
    )
    batches = list(data.calibration_dataloader())
    if options.part == "forward":
        with torch.inference_mode():
            for batch in batches:
                model.model(**batch, use_cache=False)  # as pruning: no output projection
    else:
        prune_model(model, batches, score="ria", sparsity=0.5)
    config = model.config
    layers = [layer.parameter.numel() for layer in prunable_layers(model)]
    waiting = sequences * options.length * 4 * (2 * config.hidden_size + config.intermediate_size)
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "formula": waiting + sum(layers) + 4 * 5 * max(layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--part", choices=["forward", "prune"])
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(work(options)))
        return
    print("| tokens | forward | pruning | more | formula | formula / more |")
    print("|---|---|---|---|---|---|")
    for sequences in options.sequences:
        forward = run(options, "forward", sequences)
        pruning = run(options, "prune", sequences)
        more = (pruning["peak"] - forward["peak"]) / 2**20
        formula = pruning["formula"] / 2**20
        peaks = f"{forward['peak'] / 2**20:.0f} MiB | {pruning['peak'] / 2**20:.0f} MiB"
        tokens = sequences * options.length
        print(
            f"| {tokens:,} | {peaks} | {more:.0f} MiB | {formula:.0f} MiB | {formula / more:.2f} |"
        )


if __name__ == "__main__":
    main()
