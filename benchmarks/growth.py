"""Time and memory of pruning relative to a plain forward, by tokens, depth, width and experts.

    python benchmarks/growth.py [--plot docs/growth.svg]

Models have random weights and the shape of Llama, or of Mixtral with two experts per token; one has
the shape of SmolLM2-135M. Each run is a separate process, on the CPU in float32: a forward of the
batches without the output projection, which pruning does not run either, or pruning by RIA. Memory
is the increase of the resident set to its peak during the run (Linux only).

The formula, for the calibration order ``layer``, in bytes:

    tokens · 4 · (3 · hidden + intermediate)    the batches suspended in a block: its input, the
                                                residual stream, the normalized input and the
                                                gate's output
  + weights pruned / 8                          masks, one bit each
  + 4 · 5 · min(largest layer, 2²⁰)             float32 copies of the rows that are scored together

It counts memory in use. glibc keeps freed memory between allocations in use, so every run is
measured twice: by default, and with MALLOC_MMAP_THRESHOLD_, which makes glibc return freed memory.

An exponent b of a figure is the slope of its least-squares line in the logarithms: the figure grows
like xᵇ while the other parameters stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from symprune_lightning import prune_model
from symprune_lightning.engine.layers.select import prunable_layers
from symprune_lightning.functional.tensors import WEIGHTS_AT_ONCE
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
    experts: int = 1


BASE = Case()
SMALL = Case(hidden=288, layers=8, experts=4)
AXES = {
    "tokens": [replace(BASE, sequences=n) for n in (4, 8, 16, 32)],
    "layers": [replace(BASE, layers=n) for n in (8, 15, 30, 60)],
    "hidden": [replace(BASE, hidden=n) for n in (288, 576, 1152)],
    "experts": [replace(SMALL, experts=n) for n in (4, 8, 16, 32)],
}
"""Cases that differ in one parameter."""


def value_of(case: Case, axis: str) -> int:
    return case.sequences * LENGTH if axis == "tokens" else getattr(case, axis)


def model_of(case: Case) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * 8 // 3,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    model: PreTrainedModel
    if case.experts > 1:
        model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=case.experts))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
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
    model: Any = model_of(case)
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
    sizes = [rows * columns for rows, columns in (x.shape for x in prunable_layers(model))]
    config = model.config
    bytes_per_token = 4 * (3 * config.hidden_size + config.intermediate_size)
    return {
        "seconds": seconds,
        "rise": memory("VmHWM") - before,
        "formula": case.sequences * LENGTH * bytes_per_token
        + sum(sizes) // 8
        + 4 * 5 * min(max(sizes), WEIGHTS_AT_ONCE),
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


def figures_of(case: Case) -> dict[str, float]:
    """Return time and memory of a case: of a forward, of pruning, and by the formula."""
    log(f"{case}")
    forward, pruning = (run(case, part) for part in ("forward", "prune"))
    without_freed = {part: run(case, part, **RETURN_FREED) for part in ("forward", "prune")}
    return {
        "weights": pruning["weights"],
        "forward": forward["seconds"],
        "pruning": pruning["seconds"],
        "additional": pruning["rise"] - forward["rise"],
        "in use": without_freed["prune"]["rise"] - without_freed["forward"]["rise"],
        "formula": pruning["formula"],
    }


def parameters(case: Case) -> list[str]:
    """Return the first cells of a row."""
    return [f"{case.sequences * LENGTH:,}", str(case.hidden), str(case.layers), str(case.experts)]


def time_row(case: Case, figures: dict[str, float]) -> list[str]:
    """Return a row of the table of times."""
    return [
        *parameters(case),
        f"{figures['weights'] / 1e6:.0f} M",
        f"{figures['forward']:.1f}",
        f"{figures['pruning']:.1f}",
        f"{figures['pruning'] / figures['forward']:.2f}",
    ]


def memory_row(case: Case, figures: dict[str, float]) -> list[str]:
    """Return a row of the table of memory."""
    is_dense = case.experts == 1  # the formula does not cover experts
    return [
        *parameters(case),
        f"{figures['additional'] / MIB:.0f}",
        f"{figures['in use'] / MIB:.0f}",
        f"{figures['formula'] / MIB:.0f}" if is_dense else "–",
        f"{figures['formula'] / figures['in use']:.2f}" if is_dense else "–",
    ]


def exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """Return b of the least-squares fit y = a xᵇ."""
    slope, _ = np.polyfit(np.log(list(x)), np.log(list(y)), 1)
    return float(slope)


def fit(axis: str, measured: dict[Case, dict[str, float]]) -> list[str]:
    """Return the exponents of one parameter as a row."""
    x = [value_of(case, axis) for case in AXES[axis]]
    cells = []
    for figure in ("forward", "pruning", "in use"):
        y = [measured[case][figure] for case in AXES[axis]]
        cells.append(f"{exponent(x, y):.2f}")
    return [axis, f"{min(x):,} – {max(x):,}", *cells]


def plot(measured: dict[Case, dict[str, float]], path: Path) -> None:
    """Plot the seconds of a forward and of pruning against each parameter."""
    figure = Figure(figsize=(7.5, 6), layout="constrained", facecolor="white")
    for axes, axis in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        x = [value_of(case, axis) for case in AXES[axis]]
        for name, color, marker in (("forward", "gray", "s"), ("pruning", "tab:blue", "o")):
            y = [measured[case][name] for case in AXES[axis]]
            label = f"{name}: exponent {exponent(x, y):.2f}"
            axes.plot(x, y, color=color, marker=marker, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(axis)
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=["forward", "prune"])
    parser.add_argument("--case", default="{}")
    parser.add_argument("--plot", type=Path, help="also write this figure")
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(work(Case(**json.loads(options.case)), options.part)))
        return
    cases = dict.fromkeys(case for axis in AXES.values() for case in axis)
    measured = {case: figures_of(case) for case in cases}
    heading = ("tokens", "hidden", "layers", "experts")
    section(
        "Tokens, depth, width and experts",
        "`benchmarks/growth.py`: pruning Llama- and Mixtral-shaped models with random weights by "
        "RIA, float32, relative to a plain forward of the same batches without the output "
        "projection, each in a separate process.",
        (*heading, "weights pruned", "forward, s", "pruning, s", "pruning, × forward"),
        [time_row(case, figures) for case, figures in measured.items()],
    )
    print(
        "\n![Seconds of a forward and of pruning against tokens, layers, width and experts]"
        "(growth.svg)"
    )
    section(
        "Memory of growth",
        "The same runs, MiB in addition to that of the forward. The formula is in the script; "
        "memory that is not in use is kept by glibc, and returned with "
        "`MALLOC_MMAP_THRESHOLD_=65536`.",
        (*heading, "additional", "of it in use", "formula", "formula / in use"),
        [memory_row(case, figures) for case, figures in measured.items()],
    )
    section(
        "Exponents of growth",
        "The same runs: exponent b of the fit a·xᵇ for each parameter, the others being fixed.",
        ("parameter", "range", "forward, s", "pruning, s", "additional memory in use"),
        [fit(axis, measured) for axis in AXES],
    )
    if options.plot is not None:
        plot(measured, options.plot)


if __name__ == "__main__":
    main()
