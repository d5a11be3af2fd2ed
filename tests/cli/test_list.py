"""``symprune list`` lists every method and recipe."""

from __future__ import annotations

import pytest

from symprune_lightning.cli.list import BASES
from symprune_lightning.cli.recipes import recipe_files
from symprune_lightning.functional.registry import leaves


@pytest.mark.parametrize("columns", [60, 200])
def test_methods_and_recipes(symprune, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    symprune("list")
    text = capsys.readouterr().out
    rows = {line.split()[1] for line in text.splitlines() if line.startswith("│")}
    for name in ("SymWanda", "R2DSnoT", "OBSUpdate", "SparseGPT", "OWL", "Search", "NM"):
        assert name in rows
    assert {method.__name__ for base in BASES.values() for method in leaves(base)} <= rows
    assert set(recipe_files()) <= rows
    # on one line, however long, so that it can be copied
    assert f"recipes in {recipe_files()['ria'].parent}\n" in text
    assert "`" not in text


def test_arguments_are_refused(symprune):
    with pytest.raises(SystemExit, match="2"):
        symprune("list", "scores")
