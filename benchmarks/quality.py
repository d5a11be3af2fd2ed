"""Perplexity of SmolLM2-135M pruned by scores, refiners and compositions.

    python benchmarks/quality.py MODEL --csv docs/quality.csv [--budgets 60%] [--seeds 0 1]
    python benchmarks/quality.py --csv docs/quality.csv --table
    python benchmarks/quality.py --csv docs/quality.csv --plot docs/quality.svg

MODEL is any model that CausalLMModule accepts. Calibration and evaluation use different documents
of one text, by default the Python manual (english.py makes another one); the seed shuffles the
documents. The main methods run at every budget with
every seed, the others at 60 % with seed 0; methods named by --methods run at every requested budget
and seed. Every run appends a row to the CSV file, and runs that have a row are skipped, so that a
stopped study can be resumed. Nothing is tuned on the evaluation text: all hyper-parameters are
defaults.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from symprune_lightning import (
    ADMM,
    OWL,
    RIA,
    CalibrationDataModule,
    CausalLMModule,
    DSnoT,
    ExactSwap,
    GradientWanda,
    MaskedCG,
    OBSUpdate,
    Progression,
    R2DSnoT,
    Sensitivity,
    SparseGPT,
    SymPrune,
    Trainer,
)
from symprune_lightning.cli.sweep import Sweep
from tables import QUIET_TRAINER, append_row, read_rows

Settings = dict[str, Any]
"""Arguments of ``SymPrune``."""

BUDGETS: dict[str, Settings] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
PLOTTED = ("50%", "60%", "2:4")
LARGEST = 150
"""Largest perplexity on the axis of the plot."""

SCORES = ("Magnitude", "Wanda", "RI", "RIA", "SymWanda", "Symmetric", "LpRIA", "StochRIA")
REFINERS: dict[str, Any] = {
    "–": None,
    "DSnoT": DSnoT(),
    "R²-DSnoT": R2DSnoT(),
    "R²-DSnoT (mean)": R2DSnoT(guard="mean"),
    "R²-DSnoT (gram)": R2DSnoT(guard="gram"),
    "ExactSwap": ExactSwap(),
}
EXACT: Settings = {"score": "ria", "refine": ExactSwap()}
GRADIENT: Settings = {"score": GradientWanda(), "group": "layer", "allocation": Sensitivity()}
COMPOSITIONS: dict[str, Settings] = {
    "ADMM": {"solver": ADMM()},
    "RIA + ExactSwap + MaskedCG": {**EXACT, "update": MaskedCG()},
    "RIA + ExactSwap + MaskedCG + Sensitivity": {
        **EXACT,
        "update": MaskedCG(),
        "allocation": Sensitivity(),
    },
    "GradientWanda + Sensitivity": GRADIENT,
    "GradientWanda + ExactSwap + Sensitivity": {**GRADIENT, "refine": ExactSwap()},
    "RIA + ExactSwap + Sensitivity": {**EXACT, "allocation": Sensitivity()},
    "SparseGPT": {"solver": SparseGPT()},
    "SparseGPT, group layer": {"solver": SparseGPT(), "group": "layer"},
    "RIA + OBSUpdate": {"score": "ria", "update": OBSUpdate()},
    "RIA + ExactSwap + OBSUpdate": {**EXACT, "update": OBSUpdate()},
    "RIA + OWL": {"score": "ria", "allocation": OWL()},
    "RIA + Progression": {"score": "ria", "allocation": Progression()},
    "RIA + ExactSwap + Progression": {**EXACT, "allocation": Progression()},
    "RIA + ExactSwap + OBSUpdate + Progression": {
        **EXACT,
        "update": OBSUpdate(),
        "allocation": Progression(),
    },
    "RIA + R²-DSnoT, grow relative": {
        "score": "ria",
        "refine": R2DSnoT(grow_relative=True, prune_relative=False),
    },
    "RIA + R²-DSnoT, both relative": {"score": "ria", "refine": R2DSnoT(grow_relative=True)},
    "RIA + R²-DSnoT, same sign": {"score": "ria", "refine": R2DSnoT(same_sign=True)},
    "RIA + R²-DSnoT, α = 1": {"score": "ria", "refine": R2DSnoT(alpha=1.0)},
    "RIA + R²-DSnoT, γ₂ = 0.1": {"score": "ria", "refine": R2DSnoT(gamma2=0.1)},
    "RIA + R²-DSnoT, ε = 0.005": {"score": "ria", "refine": R2DSnoT(threshold=5e-3)},
    "RIA + R²-DSnoT, γ₂ = 0.1, p = 1": {"score": "ria", "refine": R2DSnoT(p=1.0, gamma2=0.1)},
    "RIA, α = 1": {"score": RIA(alpha=1.0)},
}
MAIN = (
    *("Magnitude", "Wanda", "RIA", "RIA + R²-DSnoT", "RIA + R²-DSnoT (gram)", "RIA + ExactSwap"),
    *("SparseGPT", "RIA + ExactSwap + OBSUpdate", "RIA + ExactSwap + Progression"),
    "RIA + ExactSwap + OBSUpdate + Progression",
    *("GradientWanda + Sensitivity", "GradientWanda + ExactSwap + Sensitivity"),
)
FIELDS = ("text", "budget", "method", "seed", "perplexity", "seconds", "error")


def methods() -> dict[str, Settings]:
    """Return every score with every refiner, and the compositions, by name."""
    crossed = {
        score if refiner is None else f"{score} + {name}": {"score": score, "refine": refiner}
        for score in SCORES
        for name, refiner in REFINERS.items()
    }
    return crossed | COMPOSITIONS


def is_planned(budget: str, name: str, seed: int) -> bool:
    """Return whether a method runs without being named by ``--methods``."""
    crossed = name.startswith(("Wanda", "RIA")) or name in SCORES or name in COMPOSITIONS
    return name in MAIN or (budget == "60%" and seed == 0 and crossed)


def runs(options: argparse.Namespace, seed: int) -> Iterator[tuple[str, str, Settings]]:
    """Yield budget, name and settings of the runs of a seed that have no row yet."""
    finished = {
        (row["budget"], row["method"], int(row["seed"])) for row in rows(options.csv, options.text)
    }
    for budget in options.budgets:
        for name, settings in methods().items():
            if (budget, name, seed) in finished or ("allocation" in settings and ":" in budget):
                continue
            if name in options.methods if options.methods else is_planned(budget, name, seed):
                yield budget, name, {**settings, **BUDGETS[budget]}


def study(options: argparse.Namespace) -> list[str]:
    """Run all methods; return the failures."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # three lines per Trainer
    failures = []
    for seed in options.seeds:
        remaining = list(runs(options, seed))
        if not remaining:
            continue
        data = CalibrationDataModule(
            options.dataset,
            options.model,
            sequences=options.sequences,
            sequence_length=512,
            evaluation_sequences=options.evaluation,
            batch_size=4,
            seed=seed,
        )
        # a module per seed: the weights of the last one are pruned
        module = CausalLMModule(options.model, dtype="float32")
        sweep = Sweep(module, data, options.folder / options.text / f"seed-{seed}")
        for budget, name, settings in remaining:
            callback = SymPrune(**settings)
            result = sweep.run(
                f"{budget} {name}", Trainer(callbacks=[callback], **QUIET_TRAINER), callback
            )
            if result.failure is not None:
                failures.append(f"{budget} {name}, seed {seed}: {result.failure}")
                continue
            dense = {"text": options.text, "method": "dense", "seed": str(seed)}
            if not any(dense.items() <= row.items() for row in rows(options.csv)):
                values = (options.text, "dense", "dense", seed, result.dense, 0, None)
                append_row(options.csv, FIELDS, values)
            figures = (result.perplexity, result.seconds, result.error)
            append_row(options.csv, FIELDS, (options.text, budget, name, seed, *figures))
    return failures


def rows(path: Path, text: str | None = None) -> list[dict[str, str]]:
    """Return the rows of the CSV file, all of them or those of one text."""
    return [row for row in read_rows(path) if text in (None, row["text"])]


def table(path: Path, text: str) -> str:
    """Return a Markdown table with a row per method, a column per budget, and means over seeds."""
    values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows(path, text):
        values[row["method"], row["budget"]].append(float(row["perplexity"]))
    dense = statistics.mean(values.pop(("dense", "dense")))
    budgets = [b for b in BUDGETS if any(budget == b for _, budget in values)]
    lines = [
        f"Dense: {dense:.2f}. A number in brackets is the number of seeds, if not all.",
        "",
        f"| method | {' | '.join(budgets)} |",
        f"|---|{'---:|' * len(budgets)}",
    ]
    seeds = max(len(perplexities) for perplexities in values.values())
    for name in methods():
        cells = []
        for budget in budgets:
            perplexities = values.get((name, budget), [])
            count = "" if len(perplexities) in (0, seeds) else f" ({len(perplexities)})"
            cells.append(f"{statistics.mean(perplexities):.1f}{count}" if perplexities else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, text: str, output: Path) -> None:
    """Plot one dot per run: a panel per budget, a row per method, a color per seed.

    Perplexities above the range are written at the edge, as means over the seeds.
    """
    pruned = [row for row in rows(path, text) if row["budget"] in PLOTTED]
    names = [name for name in methods() if any(row["method"] == name for row in pruned)][::-1]
    height = 0.24 * len(names) + 1.2
    figure, axes = pyplot.subplots(
        1, len(PLOTTED), sharey=True, figsize=(9.5, height), layout="constrained"
    )
    for axis, budget in zip(axes, PLOTTED, strict=True):
        for seed, color in (("0", "tab:blue"), ("1", "tab:orange")):
            found = [row for row in pruned if row["budget"] == budget and row["seed"] == seed]
            dots = [(float(row["perplexity"]), names.index(row["method"])) for row in found]
            shown = [dot for dot in dots if dot[0] <= LARGEST]
            axis.scatter(
                [value for value, _ in shown],
                [row for _, row in shown],
                color=color,
                label=f"seed {seed}",
                zorder=2,
            )
        for number, name in enumerate(names):
            values = [
                float(row["perplexity"])
                for row in pruned
                if (row["budget"], row["method"]) == (budget, name)
            ]
            if values and min(values) > LARGEST:
                style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8}
                axis.text(LARGEST, number, f"{statistics.mean(values):.0f} →", **style)
        axis.set_xscale("log")
        axis.set_xlim(15, LARGEST)
        axis.set_xticks([20, 30, 50, 100], ["20", "30", "50", "100"])
        axis.minorticks_off()
        axis.set_title(budget)
        axis.grid(alpha=0.3)
        axis.set_xlabel("perplexity")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].legend(loc="lower right")
    figure.savefig(output, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--csv", type=Path, default=Path("quality.csv"))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quality"), help="cache of results"
    )
    parser.add_argument("--table", action="store_true", help="print the table and exit")
    parser.add_argument("--plot", type=Path, help="write this figure and exit")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument(
        "--methods", nargs="+", default=[], help="run these in place of the planned ones"
    )
    parser.add_argument("--text", default="python-docs", help="name of the text in the CSV file")
    parser.add_argument("--dataset", default="python-docs", help="the text, such as a .jsonl file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--sequences", type=int, default=16, help="calibration sequences of 512 tokens"
    )
    parser.add_argument(
        "--evaluation", type=int, default=24, help="evaluation sequences of 512 tokens"
    )
    options = parser.parse_args()
    if options.table:
        print(table(options.csv, options.text))
    elif options.plot is not None:
        plot(options.csv, options.text, options.plot)
    elif options.model is None:
        parser.error("MODEL is required")
    elif failures := study(options):
        raise SystemExit("\n".join(["some methods failed", *failures]))


if __name__ == "__main__":
    main()
