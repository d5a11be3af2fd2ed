"""``symprune list``: the methods and recipes of this installation, without importing torch."""

from __future__ import annotations

import ast
from pathlib import Path

from rich.console import Console
from rich.table import Table

import symprune_lightning
from symprune_lightning.cli.recipes import recipe_files

BASES = {
    "scores": "scores.Score",
    "refiners": "refiners.base.MaskRefiner",
    "weight updates": "update.WeightUpdate",
    "solvers": "solvers.LayerSolver",
    "allocations": "allocation.AllocationMethod",
    "patterns": "patterns.Pattern",
}
"""Kinds of methods, and their base classes in ``symprune_lightning.functional``."""


def list_methods() -> None:
    """Print all methods, and the recipes of the package."""
    console = Console(emoji=False, markup=False)  # "N:M:" would be read as an emoji
    for title, kind in methods().items():
        table = Table("name", "summary", title=title, title_justify="left", show_header=False)
        for method in kind:
            table.add_row(method.name, _summary(method))
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


def methods() -> dict[str, list[ast.ClassDef]]:
    """Return the definitions of the package's methods by kind."""
    classes = _classes()
    return {kind: _leaves(base.rpartition(".")[2], classes) for kind, base in BASES.items()}


def _classes() -> list[ast.ClassDef]:
    """Return the classes in the sources of ``functional``: importing them would import torch."""
    folder = Path(symprune_lightning.__file__).parent / "functional"
    modules = (ast.parse(file.read_text("utf-8")) for file in sorted(folder.rglob("*.py")))
    return [node for module in modules for node in module.body if isinstance(node, ast.ClassDef)]


def _leaves(base: str, classes: list[ast.ClassDef]) -> list[ast.ClassDef]:
    """Return the methods among the subclasses of a base, which are dataclasses."""
    found = []
    for node in classes:
        if base in (ast.unparse(parent) for parent in node.bases):
            is_method = any("dataclass" in ast.unparse(x) for x in node.decorator_list)
            found += [node] * is_method + _leaves(node.name, classes)
    return found


def _summary(method: ast.ClassDef) -> str:
    return (ast.get_docstring(method) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
