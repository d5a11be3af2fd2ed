"""Time, memory and traffic of pruning large models, computed and not measured.

    python benchmarks/projection.py

Prints the table of docs/scaling.md. Bytes and operations follow from the shapes of the models and
from what the code does; the speed of the GPUs is assumed (the constants below). What can be
measured here, that pruning takes a constant time per weight and per activation besides the forward,
is compared with the growth table in docs/benchmarks.md.

RIA, order ``layer``, with FSDP2 (one GPU: in memory), per rank of n:

    time      2 · active weights · tokens / (n · FLOPS)           the forward
              + SCORING_BYTES · weights / (n · BANDWIDTH)         scores, selection and masks
              + MOMENT_BYTES · tokens · inputs / (n · BANDWIDTH)  moments of the activations
              + traffic / link
    memory    2 · weights / n                                     bfloat16 shards
              + 2 · block                                         one unsharded block
              + tokens / n · 2 · (3 · hidden + intermediate)      the suspended batches
              + 4 · 5 · min(largest layer, 2²⁶)                   float32 copies of some rows
    host      weights / 8                                         masks of the result, on each rank
    traffic   2 · weights · (n − 1) / n                           weights, gathered once
              + weights / 8 · (n − 1) / n                         masks, one bit each
              + 2 · 2 · 8 · inputs of the layers                  moments, float64, ring all-reduce
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from symprune_lightning.functional.tensors import WEIGHTS_AT_ONCE_ON_GPU
from tables import log, section

TOKENS = 128 * 2048
FLOPS = 400e12
"""Operations per second in bfloat16: 40 % of the peak of an H100. Assumed."""
BANDWIDTH = 2e12
"""Bytes per second of GPU memory: 60 % of an H100's. Assumed."""
SCORING_BYTES = 400
"""Bytes of GPU memory per weight for scores, selection and masks: 100 passes. Assumed."""
MOMENT_BYTES = 14
"""Bytes of GPU memory per activation for its moments: read in bfloat16, as float32, and squared."""
NVLINK, NETWORK = 300e9, 40e9
"""Bytes per second and GPU within 8 GPUs, and between machines. Assumed."""
GPU_MEMORY = 80e9
BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Shape:
    """Shape of a model, from the config.json of its checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    key: int
    experts: int = 1
    active: int = 1
    vocabulary: int = 128256

    @property
    def attention(self) -> int:
        """Weights of the attention of a block."""
        return self.hidden * (2 * self.query + 2 * self.key)

    def block(self, experts: int) -> int:
        """Return the weights of a block with this number of experts."""
        return self.attention + experts * 3 * self.hidden * self.intermediate

    def inputs(self, experts: int) -> int:
        """Return the channels of the measured inputs: of q, k and v one, and of gate and up."""
        return self.layers * (
            self.hidden + self.query + experts * (self.hidden + self.intermediate)
        )


MODELS = {
    "Llama 3 8B": Shape(4096, 14336, 32, 4096, 1024),
    "Llama 3 70B": Shape(8192, 28672, 80, 8192, 1024),
    "Qwen3 235B-A22B": Shape(4096, 1536, 94, 8192, 512, 128, 8, 151936),
}


def projected(shape: Shape, ranks: int) -> tuple[float, float, float]:
    """Return seconds, bytes of memory per GPU and bytes received per GPU."""
    weights, active = (shape.layers * shape.block(n) for n in (shape.experts, shape.active))
    others = (ranks - 1) / ranks
    traffic = (2 + 1 / 8) * weights * others + (
        32 * shape.inputs(shape.experts) if ranks > 1 else 0
    )
    seconds = (
        2 * active * TOKENS / (ranks * FLOPS)
        + SCORING_BYTES * weights / (ranks * BANDWIDTH)
        + MOMENT_BYTES * TOKENS * shape.inputs(shape.active) / (ranks * BANDWIDTH)
        + traffic / (NVLINK if ranks <= 8 else NETWORK)
    )
    embeddings = 2 * 2 * shape.vocabulary * shape.hidden
    wide = shape.intermediate * shape.active
    memory = (
        (2 * weights + embeddings) / ranks
        + (2 * shape.block(shape.experts) if ranks > 1 else 0)
        + TOKENS / ranks * 2 * (3 * shape.hidden + wide)
        + 4 * 5 * min(shape.hidden * shape.intermediate, WEIGHTS_AT_ONCE_ON_GPU)
    )
    return seconds, memory, traffic


def rows() -> Iterator[list[str]]:
    """Yield the rows of the table."""
    for name, shape in MODELS.items():
        for ranks in (1, 8, 64):
            seconds, memory, traffic = projected(shape, ranks)
            fits = memory <= GPU_MEMORY
            yield [
                name,
                str(ranks),
                f"{seconds:.0f}" if fits else "–",
                f"{memory / 1e9:.0f}" if fits else f"{memory / 1e9:.0f}: stream it",
                f"{traffic / 1e9:.0f}",
                f"{shape.layers * shape.block(shape.experts) / 8e9:.0f}",
            ]


def checks() -> Iterator[list[str]]:
    """Yield measured costs of the growth table, and those of a fit with the formula's two terms.

    Beside the forward: a time per weight, and a time per activation for its moments.
    """
    lines = BENCHMARKS.read_text(encoding="utf-8").split("## Tokens, depth, width and experts")[1]
    table = [line.strip("| ").split(" | ") for line in lines.split("##")[0].splitlines()]
    rows = [c for c in table if len(c) > 7 and c[0].replace(",", "").isdigit() and c[3] == "1"]
    tokens, hidden, layers, weights = (
        np.array([float(c[i].replace(",", "").removesuffix(" M")) for c in rows])
        for i in (0, 1, 2, 4)
    )
    forward, measured = (np.array([float(c[i]) for c in rows]) for i in (5, 6))
    activations = tokens * layers * hidden * (3 + 8 / 3)  # three inputs, and the intermediate one
    terms = np.stack([weights * 1e6, activations], 1)
    # relative to the measured time, so that short runs count as much as long ones
    coefficients, *_ = np.linalg.lstsq(
        terms / measured[:, None], (measured - forward) / measured, rcond=None
    )
    predicted = forward + terms @ coefficients
    log(f"ns per weight and per activation: {coefficients * 1e9}")
    for row, before, after in zip(rows, measured, predicted, strict=True):
        yield [
            row[0],
            row[4],
            row[1],
            row[2],
            f"{before:.1f}",
            f"{after:.1f}",
            f"{after / before:.2f}",
        ]


def main() -> None:
    section(
        "Projection",
        f"`benchmarks/projection.py`: RIA with {TOKENS:,} tokens in bfloat16, computed by the "
        f"formula in the script for {FLOPS / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12:.0f} TB/s, "
        f"{NVLINK / 1e9:.0f} GB/s within and {NETWORK / 1e9:.0f} GB/s between machines of 8 GPUs. "
        f"Not measured.",
        (
            "model",
            "GPUs",
            "seconds",
            "GB per GPU",
            "GB received per GPU",
            "GB of masks in the memory of each process",
        ),
        rows(),
    )
    section(
        "Check",
        "The measured times of the growth table, and the forward plus a fit of two terms: a time "
        "per weight and a time per activation.",
        ("tokens", "weights", "hidden", "layers", "measured, s", "fit, s", "fit / measured"),
        checks(),
    )


if __name__ == "__main__":
    main()
