"""Perplexity of SmolLM2-135M pruned by scores, refiners and compositions.

    python benchmarks/quality.py MODEL --csv docs/quality.csv [--budgets 60%] [--seeds 0 1]
    python benchmarks/quality.py --csv docs/quality.csv --table
    python benchmarks/quality.py --csv docs/quality.csv --plot docs/quality.png

MODEL is anything that CausalLMModule takes. Calibration and evaluation text are different documents
of the Python manual; the seed shuffles the documents. The main methods run at every budget with
every seed, the others at 60 % with seed 0; those that --methods names, wherever it is asked for.
Every run is a row of the CSV file, written when it is done; a row that is there is not run again,
so a run that was stopped goes on. Nothing is chosen by the evaluation text: all hyper-parameters
are defaults.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from torch import Tensor
from transformers import PreTrainedModel

from symprune_lightning import (
    OWL,
    RIA,
    CalibrationDataModule,
    CausalLMModule,
    DSnoT,
    ExactSwap,
    OBSUpdate,
    Progression,
    R2DSnoT,
    SparseGPT,
    prune_model,
)
from symprune_lightning.pretrained import load_model

BUDGETS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
SCORES = ("Magnitude", "Wanda", "RI", "RIA", "SymWanda", "Symmetric", "LpRIA", "StochRIA")
REFINERS: dict[str, Any] = {
    "–": None,
    "DSnoT": DSnoT(),
    "R²-DSnoT": R2DSnoT(),
    "R²-DSnoT (mean)": R2DSnoT(guard="mean"),
    "R²-DSnoT (gram)": R2DSnoT(guard="gram"),
    "ExactSwap": ExactSwap(),
}
EXACT: dict[str, Any] = {"score": "ria", "refine": ExactSwap()}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "SparseGPT": {"update": SparseGPT()},
    "SparseGPT, group layer": {"update": SparseGPT(), "group": "layer"},
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
    "RIA + R²-DSnoT, p = 1": {"score": "ria", "refine": R2DSnoT(p=1.0, gamma2=0.1)},
    "RIA, α = 1": {"score": RIA(alpha=1.0)},
}
MAIN = (
    *("Magnitude", "Wanda", "RIA", "RIA + R²-DSnoT", "RIA + R²-DSnoT (gram)", "RIA + ExactSwap"),
    *("SparseGPT", "RIA + ExactSwap + OBSUpdate", "RIA + ExactSwap + Progression"),
    "RIA + ExactSwap + OBSUpdate + Progression",
)
FIELDS = ("budget", "method", "seed", "perplexity", "seconds", "error")


def methods() -> dict[str, dict[str, Any]]:
    """Every score with every refiner, and what else is composed: what may be run."""
    found: dict[str, dict[str, Any]] = {}
    for score in SCORES:
        for name, refiner in REFINERS.items():
            found[score if refiner is None else f"{score} + {name}"] = {
                "score": score,
                "refine": refiner,
            }
    return found | COMPOSITIONS


def planned(budget: str, name: str, seed: int) -> bool:
    """Whether it is run without being asked for by name."""
    crossed = name.startswith(("Wanda", "RIA")) or name in SCORES or name in COMPOSITIONS
    return name in MAIN or (budget == "60%" and seed == 0 and crossed)


@torch.inference_mode()
def perplexity(module: CausalLMModule, batches: Iterable[dict[str, Tensor]]) -> float:
    module.val_perplexity.reset()
    for batch in batches:
        module.validation_step(batch, 0)
    return float(module.val_perplexity.compute())


def study(options: argparse.Namespace) -> None:
    path = Path(options.csv)
    done = {(row["budget"], row["method"], int(row["seed"])) for row in rows(path)}
    model: PreTrainedModel = load_model(options.model, dtype="float32")
    module = CausalLMModule(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in options.seeds:
        data = CalibrationDataModule(
            "python-docs",
            options.model,
            sequences=options.sequences,
            sequence_length=512,
            evaluation_sequences=options.evaluation,
            batch_size=4,
            seed=seed,
        )
        calibration = list(data.calibration_dataloader())
        if ("dense", "dense", seed) not in done:
            model.load_state_dict(dense)
            append(path, "dense", "dense", seed, perplexity(module, data.val_dataloader()), 0, None)
        for budget in options.budgets:
            for name, method in methods().items():
                if not (name in options.methods or planned(budget, name, seed)):
                    continue
                if (budget, name, seed) in done or ("allocation" in method and ":" in budget):
                    continue
                model.load_state_dict(dense)
                start = time.perf_counter()
                result = prune_model(model, calibration, **{**method, **BUDGETS[budget]})
                seconds = time.perf_counter() - start
                errors = [x.error_updated or x.error_refined for x in result.layers]
                error = None if errors[0] is None else sum(e or 0 for e in errors) / len(errors)
                value = perplexity(module, data.val_dataloader())
                append(path, budget, name, seed, value, seconds, error)


def append(path: Path, *values: object) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerow(values)
    print(*values, flush=True)


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path) -> str:
    """Markdown: a row per method, a column per budget, means over seeds."""
    values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows(path):
        values[row["method"], row["budget"]].append(float(row["perplexity"]))
    dense = statistics.mean(values.pop(("dense", "dense")))
    budgets = [b for b in BUDGETS if any(budget == b for _, budget in values)]
    lines = [
        f"Dense: {dense:.2f}. A number in brackets is how many seeds the mean is over, if not all.",
        "",
        f"| method | {' | '.join(budgets)} |",
        f"|---|{'---:|' * len(budgets)}",
    ]
    seeds = max(len(found) for found in values.values())
    for name in methods():
        cells = []
        for budget in budgets:
            found = values.get((name, budget), [])
            count = "" if len(found) in (0, seeds) else f" ({len(found)})"
            cells.append(f"{statistics.mean(found):.1f}{count}" if found else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, picture: Path) -> None:
    """One dot per run: perplexity by method, a panel per budget, a colour per seed."""
    found = [row for row in rows(path) if row["budget"] in BUDGETS]
    names = [name for name in methods() if any(row["method"] == name for row in found)][::-1]
    figure, axes = pyplot.subplots(
        1, len(BUDGETS), sharey=True, figsize=(14, 0.3 * len(names) + 1.2), layout="constrained"
    )
    for axis, budget in zip(axes, BUDGETS, strict=True):
        for seed, colour in (("0", "tab:blue"), ("1", "tab:orange")):
            runs = [row for row in found if row["budget"] == budget and row["seed"] == seed]
            axis.scatter(
                [float(row["perplexity"]) for row in runs],
                [names.index(row["method"]) for row in runs],
                color=colour,
                label=f"seed {seed}",
                zorder=2,
            )
        axis.set_xscale("log")
        axis.set_xticks([20, 50, 100, 1000, 10000], ["20", "50", "100", "1000", "10⁴"])
        axis.minorticks_off()
        axis.set_title(budget)
        axis.grid(alpha=0.3)
        axis.set_xlabel("perplexity")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].legend()
    figure.savefig(picture, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--csv", default="quality.csv")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--plot", type=Path, help="draw this picture and stop")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=[], help="these too")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--sequences", type=int, default=16, help="to calibrate on, of 512 tokens")
    parser.add_argument("--evaluation", type=int, default=24, help="to evaluate on, of 512 tokens")
    options = parser.parse_args()
    if options.table:
        print(table(Path(options.csv)))
    elif options.plot is not None:
        plot(Path(options.csv), options.plot)
    elif options.model is None:
        parser.error("name the model")
    else:
        study(options)


if __name__ == "__main__":
    main()
