"""Time and memory of pruning relative to a plain forward, by tokens, width and depth.

    python benchmarks/growth.py

Models are Llama-shaped with random weights; one has the shape of SmolLM2-135M. Each run is a
separate process, on the CPU in float32: a forward of the batches without the output projection,
which pruning does not run either, or pruning by RIA. Memory is the increase of the resident set to
its peak during the run (Linux only).

The formula, for the calibration order ``layer``, in bytes:

    tokens · 4 · (2 · hidden + intermediate)    the batches suspended in a block: the residual
                                                stream, the normalized input and the gate's output
  + weights pruned / 8                          masks, one bit each
  + 4 · 5 · largest layer                       float32 copies while one layer is scored

It counts memory in use. glibc keeps freed memory between allocations in use, so every run is
measured twice: by default, and with MALLOC_MMAP_THRESHOLD_, which makes glibc return freed memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from symprune_lightning import prune_model
from symprune_lightning.engine.layers.select import prunable_layers
from tables import log, section

LENGTH = 512
MIB = 2**20
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """Shape of a model, and number of calibration sequences."""

    hidden: int = 576
    layers: int = 30
    sequences: int = 8


BASE = Case()
CASES = (
    *(replace(BASE, sequences=n) for n in (4, 8, 16)),
    *(replace(BASE, layers=n) for n in (15, 60)),
    *(replace(BASE, hidden=n) for n in (288, 1152)),
)


def model_of(case: Case) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


def memory(field: str) -> int:
    """Return a memory field of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Reset the peak to the resident memory, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def work(case: Case, part: str) -> dict[str, float]:
    """Measure time and memory of a forward or of pruning."""
    torch.manual_seed(0)
    model = model_of(case)
    batches = [
        {"input_ids": torch.randint(0, 49152, (1, LENGTH)), "use_cache": False}
        for _ in range(case.sequences)
    ]
    with torch.inference_mode():
        model.model(**batches[0])
    before = reset_peak()
    start = time.perf_counter()
    if part == "forward":
        with torch.inference_mode():
            for batch in batches:
                model.model(**batch)
    else:
        prune_model(model, batches, score="ria")
    seconds = time.perf_counter() - start
    sizes = [layer.parameter.numel() for layer in prunable_layers(model)]
    config = model.config
    bytes_per_token = 4 * (2 * config.hidden_size + config.intermediate_size)
    return {
        "seconds": seconds,
        "rise": memory("VmHWM") - before,
        "formula": case.sequences * LENGTH * bytes_per_token + sum(sizes) // 8 + 4 * 5 * max(sizes),
        "weights": sum(sizes),
    }


def run(case: Case, part: str, **environment: str) -> dict[str, float]:
    """Measure in a separate process."""
    command = [sys.executable, __file__, "--part", part, "--case", json.dumps(asdict(case))]
    process = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def row(case: Case) -> list[str]:
    """Return the figures of a case as a row of the table."""
    log(f"{case}")
    forward, pruning = (run(case, part) for part in ("forward", "prune"))
    without_freed = {part: run(case, part, **RETURN_FREED) for part in ("forward", "prune")}
    additional = pruning["rise"] - forward["rise"]
    in_use = without_freed["prune"]["rise"] - without_freed["forward"]["rise"]
    formula = pruning["formula"]
    return [
        f"{case.sequences * LENGTH:,}",
        f"{pruning['weights'] / 1e6:.0f} M",
        str(case.hidden),
        str(case.layers),
        f"{forward['seconds']:.1f}",
        f"{pruning['seconds'] / forward['seconds']:.2f}",
        f"{additional / MIB:.0f}",
        f"{in_use / MIB:.0f}",
        f"{formula / MIB:.0f}",
        f"{formula / in_use:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=["forward", "prune"])
    parser.add_argument("--case", default="{}")
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(work(Case(**json.loads(options.case)), options.part)))
        return
    heading = ("tokens", "weights pruned", "hidden", "layers", "forward, s", "pruning, × forward")
    memory_heading = ("additional memory, MiB", "of it in use", "formula", "formula / in use")
    section(
        "Tokens, width and depth",
        "`benchmarks/growth.py`: pruning Llama-shaped models with random weights by RIA, float32, "
        "relative to a plain forward of the same batches without the output projection, each in a "
        "separate process. The formula is in the script; memory that is not in use is kept by "
        "glibc, and returned with `MALLOC_MMAP_THRESHOLD_=65536`.",
        (*heading, *memory_heading),
        [row(case) for case in CASES],
    )


if __name__ == "__main__":
    main()
