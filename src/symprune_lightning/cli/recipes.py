"""Recipes by name or path; without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from symprune_lightning.cli.help import closest


def recipe_files() -> dict[str, Path]:
    """Return the recipes of the package by name."""
    installed = Path(str(files("symprune_lightning"))) / "recipes"
    # in a checkout the recipes are at the top level, where the wheel takes them from
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """Return the path of a recipe: an existing file, or a recipe of the package.

    Raises:
        ValueError: There is no such file or recipe.
    """
    recipes = recipe_files()
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    if name not in recipes:
        close = closest(name, list(recipes))
        hint = f" (did you mean {close}?)" if close else ""
        raise ValueError(
            f"there is no file or recipe {name}{hint}; the recipes are: {', '.join(recipes)}"
        )
    return str(recipes[name])


def resolve_recipes(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the names of recipes after ``--config`` replaced by paths.

    Raises:
        ValueError: There is no such file or recipe.
    """
    if arguments and arguments[-1] in ("--config", "-c"):
        raise ValueError(f"{arguments[-1]} needs the name of a recipe (`symprune list`) or a file")
    resolved: list[str] = []
    for argument in arguments:
        if resolved and resolved[-1] in ("--config", "-c"):
            resolved.append(find_recipe(argument))
        elif argument.startswith("--config="):
            resolved.append(f"--config={find_recipe(argument.removeprefix('--config='))}")
        else:
            resolved.append(argument)
    return resolved
