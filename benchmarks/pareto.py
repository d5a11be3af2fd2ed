"""Perplexity against cost in plain forwards, of methods from cheap to expensive.

    python benchmarks/pareto.py MODEL --csv docs/pareto.csv [--sparsity 0.6]
    python benchmarks/pareto.py --csv docs/pareto.csv --plot docs/pareto.svg

16 x 512 calibration tokens and 24 x 512 evaluation tokens of the Python manual, seed 0. Cost is the
time for pruning divided by that of a plain forward over the calibration sequences, measured before
each method in the same process. Run it on an idle machine. All arguments are defaults, but for the
number of sequences with gradients. Finished rows are not run again.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from quality import EXACT, GRADIENT
from symprune_lightning import CalibrationDataModule, CausalLMModule, R2DSnoT, SymPrune, Trainer
from tables import QUIET_TRAINER, append_row, read_rows
from timing import forward_seconds

FIELDS = ("method", "sparsity", "perplexity", "forwards", "dense", "seconds")
SENSITIVITY: dict[str, Any] = {"allocation": "sensitivity", "gradient_batches": 4}
BEST: dict[str, Any] = {**EXACT, **SENSITIVITY, "update": "maskedcg"}
METHODS: dict[str, dict[str, Any]] = {
    "Magnitude": {"score": "magnitude"},
    "Wanda": {"score": "wanda"},
    "RIA": {"score": "ria"},
    "RIA + R²-DSnoT (gram)": {"score": "ria", "refine": R2DSnoT(guard="gram")},
    "GradientWanda + Sensitivity": {**GRADIENT, "gradient_batches": 4},
    "SparseGPT": {"solver": "sparsegpt"},
    "RIA + ExactSwap": EXACT,
    "RIA + ExactSwap + Sensitivity": {**EXACT, **SENSITIVITY},
    "RIA + MaskedCG + Sensitivity": {"score": "ria", "update": "maskedcg", **SENSITIVITY},
    "RIA + ExactSwap + MaskedCG + Sensitivity": BEST,
    "ADMM + Sensitivity": {"solver": "admm", **SENSITIVITY},
    "RIA + ExactSwap + MaskedCG + Sensitivity + reconstruction": {
        **BEST,
        "calibration_order": "block",
        "reconstruct": True,
    },
}

LABELS = {
    "GradientWanda + Sensitivity": (-4, -13, "center"),
    "SparseGPT": (0, 7, "center"),
    "RIA + ExactSwap + MaskedCG + Sensitivity": (4, 6, "left"),
    "ADMM + Sensitivity": (-7, -12, "right"),
    "RIA + MaskedCG + Sensitivity": (-7, -6, "right"),
    "RIA + ExactSwap + MaskedCG + Sensitivity + reconstruction": (-7, -24, "right"),
}
"""Places of labels that would overlap others: offset in points, horizontal alignment."""


def study(options: argparse.Namespace) -> None:
    """Run the methods that have no row yet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = CalibrationDataModule(
        "python-docs", options.model, sequences=16, sequence_length=512, evaluation_sequences=24
    )
    module = CausalLMModule(options.model, dtype="float32")
    module.configure_model()
    dense = {name: value.clone() for name, value in module.state_dict().items()}
    for name, settings in METHODS.items():
        key = (name, str(options.sparsity))
        rows = read_rows(options.csv)
        if key in {(row["method"], row["sparsity"]) for row in rows}:
            continue
        module.load_state_dict(dense)
        forward = forward_seconds(module, data)
        # the dense model is evaluated once
        prune = SymPrune(**{**settings, "sparsity": options.sparsity, "baseline": not rows})
        trainer = Trainer(callbacks=[prune], **QUIET_TRAINER)
        trainer.validate(module, datamodule=data, verbose=False)
        before = rows[0]["dense"] if rows else prune.dense_metrics["val_perplexity"]
        after = prune.sparse_metrics["val_perplexity"]
        assert prune.seconds is not None
        figures = (after, prune.seconds / forward, before, prune.seconds)
        append_row(options.csv, FIELDS, (*key, *figures))


def plot(path: Path, output: Path) -> None:
    """Plot a point per method, and a line through those that no cheaper one surpasses."""
    rows = sorted(read_rows(path), key=lambda row: float(row["forwards"]))
    rows = [row for row in rows if row["method"] != "Magnitude"]  # far above the others
    figure = Figure(figsize=(7.5, 4.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    front: list[tuple[float, float]] = []
    for row in rows:
        point = float(row["forwards"]), float(row["perplexity"])
        is_best = not front or point[1] < front[-1][1]
        front += [point] * is_best
        color = "tab:blue" if is_best else "gray"
        axes.scatter(*point, color=color, zorder=2)
        x, y, alignment = LABELS.get(row["method"], (7, -3, "left"))
        style: dict[str, Any] = {"xytext": (x, y), "textcoords": "offset points", "ha": alignment}
        label = row["method"].replace(
            "MaskedCG + Sensitivity + rec", "MaskedCG +\nSensitivity + rec"
        )
        axes.annotate(label, point, color=color, fontsize=8, **style)
    axes.plot(*zip(*front, strict=True), color="tab:blue", linewidth=1, zorder=1)
    dense = float(rows[0]["dense"])
    axes.axhline(dense, color="gray", linestyle="--", linewidth=0.8)
    axes.annotate("dense", (float(rows[0]["forwards"]), dense * 1.02), color="gray", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(right=float(rows[-1]["forwards"]) * 1.15)
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_yticks([15, 20, 30, 40, 60], ["15", "20", "30", "40", "60"])
    axes.minorticks_off()
    axes.set_xlabel("time for pruning, in plain forwards of the calibration sequences")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--csv", type=Path, default=Path("pareto.csv"))
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--plot", type=Path, help="write this figure and exit")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.csv, options.plot)
    elif options.model is None:
        parser.error("MODEL is required")
    else:
        study(options)


if __name__ == "__main__":
    main()
