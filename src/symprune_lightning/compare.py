"""Several recipes on the same model and the same tokens."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from symprune_lightning.callbacks import PruningCallback, pruning_target
from symprune_lightning.datamodule import CalibrationDataModule
from symprune_lightning.files import hidden, whole_file, write_json
from symprune_lightning.module import CausalLMModule
from symprune_lightning.recipes import PruningCLI, instantiate

RESULTS = "results.json"


class CompareError(RuntimeError):
    """Some recipes have failed."""


@dataclass(frozen=True)
class Row:
    """What came of one recipe.

    Attributes:
        recipe: Its name.
        sparsity: Realised fraction of zeros.
        dense: Perplexity of the dense model.
        perplexity: That of the pruned model.
        seconds: Time for pruning: calibration forward, scores, masks, refining.
        error: Why there is nothing of the above, in words.
    """

    recipe: str
    sparsity: float | None = None
    dense: float | None = None
    perplexity: float | None = None
    seconds: float | None = None
    error: str | None = None


def compare(
    recipes: Iterable[str | Path],
    output: str | Path,
    arguments: Sequence[str] = (),
    console: Console | None = None,
) -> list[Row]:
    """Prune the same model by several recipes, and evaluate each on the same tokens.

    The model is loaded and evaluated once, and its weights are restored before each recipe. Results
    are kept as they come: a recipe that is done is not run again, one that was interrupted goes on
    from its last finished block, and one that fails does not keep the others from running.

    Args:
        recipes: Recipe files; or YAML files with a list ``recipes`` of such files (relative to it)
            and, if need be, a list ``arguments``.
        output: Folder for ``results.json``, ``results.csv`` and ``compare.png``.
        arguments: Options for every recipe, such as ``--data.sequences=16``.
        console: Where to show the table as it grows; ``None`` shows nothing.

    Returns:
        A row for each recipe.

    Raises:
        ValueError: Recipes have different models or data, or a name twice.
        OSError: A recipe can't be read, or the folder can't be written.
    """
    files, arguments = _files(recipes, arguments)
    projects = {path.stem: _project(path, arguments) for path in files}
    if len(projects) < len(files):
        raise ValueError("two recipes have the same file name: rename one of them")
    _check_alike(projects)
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(next(iter(projects.values())), folder)
    rows = []
    for name, project in projects.items():
        rows.append(bench.row(name, project))
        bench.keep()
        if console is not None:
            console.print(table(rows))
    with whole_file(folder / "results.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, folder / "compare.png")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Rows for a terminal, best first."""
    shown = Table(title="Recipes on the same model and tokens")
    for heading in ("recipe", "sparsity", "perplexity", "× dense", "seconds"):
        shown.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in sorted(rows, key=lambda row: row.perplexity or float("inf")):
        if row.error is not None or row.perplexity is None:
            shown.add_row(row.recipe, "", "failed", "", "")
            continue
        ratio = row.perplexity / (row.dense or float("nan"))
        figures = (f"{row.sparsity:.4f}", f"{row.perplexity:.3f}", f"{ratio:.3f}")
        shown.add_row(row.recipe, *figures, f"{row.seconds:.1f}")
    return shown


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against the time for pruning, as a picture; none without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 — an extra
    except ImportError:
        return
    good = [row for row in rows if row.perplexity is not None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(sorted(good, key=lambda row: -(row.perplexity or 0.0))):
        place, colour = (row.seconds or 0.0, row.perplexity or 0.0), f"C{i % 10}"
        beside: dict[str, Any] = {
            "xytext": (5, 5 if i % 2 else -11),
            "textcoords": "offset points",
            "fontsize": 8,
        }
        axes.scatter(*place, color=colour)
        axes.annotate(row.recipe, place, color=colour, **beside)
    if good and good[0].dense is not None:
        axes.axhline(good[0].dense, color="grey", linewidth=0.8, linestyle="--", label="dense")
        axes.legend(frameon=False)
    axes.set_xlabel("seconds to prune")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlim(left=0)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


class _Bench:
    """The dense model, and what is known of each recipe."""

    def __init__(self, project: PruningCLI, folder: Path) -> None:
        self.folder = folder
        self.module: CausalLMModule = project.model
        self.data: CalibrationDataModule = project.datamodule
        self.known: dict[str, Any] = {}
        if (folder / RESULTS).is_file():
            self.known = json.loads((folder / RESULTS).read_text("utf-8"))
        self.weights: dict[str, torch.Tensor] = {}
        self.dense: float | None = None

    def row(self, name: str, project: PruningCLI) -> Row:
        """What is known of a recipe, or comes of it now."""
        pruner = _pruner(project)
        asked = {
            "model": self.module.pretrained,
            "dtype": self.module.dtype_name,
            "settings": pruner.settings,
            "data": self.data.settings,
        }
        what = json.loads(json.dumps(asked))  # as it is when read back: no tuples
        known = self.known.get(name)
        if known is not None and known["what"] == what and known["row"]["error"] is None:
            return Row(**known["row"])
        try:
            row = self._run(name, project, pruner)
        except Exception as error:  # told in the table; the others go on
            row = Row(name, error=f"{type(error).__name__}: {error}")
        self.known[name] = {"what": what, "row": asdict(row)}
        return row

    def keep(self) -> None:
        """Write what is known."""
        write_json(self.folder / RESULTS, self.known)

    def _run(self, name: str, project: PruningCLI, pruner: PruningCallback) -> Row:
        self.module.configure_model()
        model = pruning_target(self.module)
        if not self.weights:
            self.weights = {key: p.detach().clone() for key, p in model.named_parameters()}
        with torch.no_grad():
            for key, value in self.weights.items():
                model.get_parameter(key).copy_(value)
        pruner.baseline = self.dense is None
        pruner.journal = hidden(self.folder / name, "journal")
        try:
            metrics = project.trainer.validate(self.module, datamodule=self.data, verbose=False)[0]
        finally:  # known even if pruning fails
            self.dense = pruner.dense_metrics.get("val_perplexity", self.dense)
        assert pruner.result is not None
        shutil.rmtree(pruner.journal, ignore_errors=True)
        return Row(
            recipe=name,
            sparsity=pruner.result.sparsity,
            dense=self.dense,
            perplexity=metrics["val_perplexity"],
            seconds=pruner.seconds,
        )


def _files(recipes: Iterable[str | Path], arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Recipe files, also those that other files list, and all arguments."""
    files: list[Path] = []
    listed: list[str] = []
    for path in map(Path, recipes):
        content = yaml.safe_load(path.read_text("utf-8"))
        if isinstance(content, dict) and "recipes" in content:
            files += [path.parent / entry for entry in content["recipes"]]
            listed += content.get("arguments", [])
        else:
            files.append(path)
    if not files:
        raise ValueError("no recipes to compare: name some files")
    return files, [*listed, *arguments]


def _project(path: Path, arguments: Sequence[str]) -> PruningCLI:
    project = instantiate(["--config", str(path), *arguments])
    if project.trainer.world_size > 1:
        raise ValueError("compare runs in one process: use devices=1")
    _pruner(project)
    return project


def _pruner(project: PruningCLI) -> PruningCallback:
    found = [c for c in project.trainer.callbacks if isinstance(c, PruningCallback)]
    if len(found) != 1 or found[0].when != "validate":
        raise ValueError("a recipe needs exactly one pruning callback with when='validate'")
    return found[0]


def _check_alike(projects: dict[str, PruningCLI]) -> None:
    """All recipes have one model and one set of tokens."""
    (first, reference), *others = projects.items()
    for name, project in others:
        for part in ("model", "data"):
            if getattr(project.config, part) != getattr(reference.config, part):
                raise ValueError(
                    f"recipes {first} and {name} have another {part}: compare needs the same, "
                    f"which options for all, such as --{part}.…, can give them"
                )
