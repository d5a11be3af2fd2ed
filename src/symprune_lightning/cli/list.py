"""``symprune list``: the methods and recipes of this installation."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from symprune_lightning.cli.recipes import recipe_files
from symprune_lightning.functional.allocation import AllocationMethod
from symprune_lightning.functional.patterns import Pattern
from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.registry import leaves
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.solvers import LayerSolver
from symprune_lightning.functional.update import WeightUpdate

BASES: dict[str, type[object]] = {
    "scores": Score,
    "refiners": MaskRefiner,
    "weight updates": WeightUpdate,
    "solvers": LayerSolver,
    "allocations": AllocationMethod,
    "patterns": Pattern,
}


def list_methods() -> None:
    """Print all methods, and the recipes of the package."""
    console = Console(emoji=False, markup=False)  # "N:M:" would be read as an emoji
    for title, base in BASES.items():
        table = Table("name", "summary", title=title, title_justify="left", show_header=False)
        for method in leaves(base):
            table.add_row(method.__name__, _summary(method))
        console.print(table)
    recipes = recipe_files()
    table = Table("recipe", "summary", show_header=False)
    for name, path in recipes.items():
        first_line = path.read_text("utf-8").splitlines()[0]
        table.add_row(name, first_line.removeprefix("#").strip())
    folder = next(iter(recipes.values())).parent
    # soft_wrap: a path that is broken into lines cannot be copied
    console.print(f"recipes in {folder}", soft_wrap=True, style="table.title")
    console.print(table)


def _summary(method: type) -> str:
    return (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
