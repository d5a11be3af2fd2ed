"""``symprune compare``: several recipes on the same model and the same tokens."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from symprune_lightning.callbacks.distillation import refuse_distillation
from symprune_lightning.callbacks.pruning import find_pruning_callback
from symprune_lightning.cli.help import ONE_DEVICE
from symprune_lightning.cli.parser import PruningCLI, instantiate
from symprune_lightning.cli.recipes import find_recipe
from symprune_lightning.cli.sweep import Sweep, SweepResult
from symprune_lightning.engine.files import atomic_file


def compare(
    recipes: Iterable[str | Path],
    output: str | Path,
    arguments: Sequence[str] = (),
    console: Console | None = None,
) -> list[SweepResult]:
    """Prune the same model by several recipes, and evaluate each on the same tokens.

    See [`Sweep`][symprune_lightning.cli.sweep.Sweep] for what is cached and resumed.

    Args:
        recipes: Names of recipes or recipe files; or YAML files with a list ``recipes`` of these
            (relative to the file) and optionally a list ``arguments``.
        output: Folder for ``results.json``, ``results.csv`` and ``compare.png``.
        arguments: Options for every recipe, such as ``--data.sequences=16``.
        console: Where to print the table after every recipe; ``None`` prints nothing.

    Returns:
        One result per recipe.

    Raises:
        ValueError: Recipes differ in their model or data, or two have the same name.
        OSError: A recipe cannot be read, or the folder cannot be written.
    """
    files, arguments = _expand(recipes, arguments)
    projects = {path.stem: _project(path, arguments) for path in files}
    if len(projects) < len(files):
        raise ValueError("two recipes have the same file name: rename one of them")
    _check_same_model_and_data(projects)
    first, folder = next(iter(projects.values())), Path(output).expanduser()
    sweep = Sweep(first.model, first.datamodule, folder)
    results = []
    for name, project in projects.items():
        callback = find_pruning_callback(project.trainer.callbacks)
        results.append(sweep.run(name, project.trainer, callback))
        if console is not None:
            console.print(table(results))
    with atomic_file(folder / "results.csv") as tmp, tmp.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    if find_spec("matplotlib") is not None:
        plot(results, folder / "compare.png")
    elif console is not None:
        console.print(
            "compare.png was not written: pip install 'symprune-lightning[report]'", markup=False
        )
    return results


def table(results: Sequence[SweepResult]) -> Table:
    """Return the results as a table: the dense model, then the best first."""
    columns = Table(title="Recipes on the same model and tokens")
    for heading in ("recipe", "sparsity", "perplexity", "× dense", "seconds"):
        columns.add_column(heading, justify="left" if heading == "recipe" else "right")
    dense = next((result.dense for result in results if result.dense is not None), None)
    if dense is not None:
        columns.add_row("dense", "0.0000", f"{dense:.3f}", "1.000", "")
    for result in sorted(results, key=lambda result: result.perplexity or float("inf")):
        if result.failure is not None or result.perplexity is None:
            columns.add_row(result.name, "", "failed", "", "")
            continue
        ratio = result.perplexity / (result.dense or float("nan"))
        cells = (f"{result.sparsity:.4f}", f"{result.perplexity:.3f}", f"{ratio:.3f}")
        seconds = "resumed" if result.seconds is None else f"{result.seconds:.1f}"
        columns.add_row(result.name, *cells, seconds)
    return columns


def plot(results: Sequence[SweepResult], path: Path) -> None:
    """Plot perplexity against the time for pruning."""
    from matplotlib.figure import Figure

    finished = [r for r in results if r.perplexity is not None and r.seconds is not None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, result in enumerate(sorted(finished, key=lambda result: -(result.perplexity or 0.0))):
        point, color = (result.seconds or 0.0, result.perplexity or 0.0), f"C{i % 10}"
        label: dict[str, Any] = {
            "xytext": (5, 5 if i % 2 else -11),
            "textcoords": "offset points",
            "fontsize": 8,
        }
        axes.scatter(*point, color=color)
        axes.annotate(result.name, point, color=color, **label)
    if finished and finished[0].dense is not None:
        axes.axhline(finished[0].dense, color="grey", linewidth=0.8, linestyle="--", label="dense")
        axes.legend(frameon=False)
    axes.set_xlabel("seconds to prune")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlim(left=0)
    with atomic_file(path) as tmp:
        figure.savefig(tmp, format="png", dpi=150)


def _expand(
    recipes: Iterable[str | Path], arguments: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Return the recipe files, including those that other files list, and all arguments."""
    files: list[Path] = []
    listed_arguments: list[str] = []
    for path in (Path(find_recipe(str(recipe))) for recipe in recipes):
        content = yaml.safe_load(path.read_text("utf-8"))
        if isinstance(content, dict) and "recipes" in content:
            files += [_listed_recipe(path.parent, entry) for entry in content["recipes"]]
            listed_arguments += content.get("arguments", [])
        else:
            files.append(path)
    if not files:
        raise ValueError("there are no recipes to compare: pass at least one")
    return files, [*listed_arguments, *arguments]


def _listed_recipe(folder: Path, entry: str) -> Path:
    path = folder / entry
    return path if path.is_file() else Path(find_recipe(entry))


def _project(path: Path, arguments: Sequence[str]) -> PruningCLI:
    project = instantiate(["--config", str(path), ONE_DEVICE, *arguments])
    if project.trainer.world_size > 1:
        raise ValueError("compare runs on one process: use devices=1")
    find_pruning_callback(project.trainer.callbacks)
    refuse_distillation(project.trainer.callbacks, "compare")
    return project


def _check_same_model_and_data(projects: dict[str, PruningCLI]) -> None:
    (first, reference), *others = projects.items()
    for name, project in others:
        for part in ("model", "data"):
            if project.config[part] != reference.config[part]:
                raise ValueError(
                    f"recipes {first} and {name} differ in {part}: use the same, for example by "
                    f"options --{part}.… for all recipes"
                )
