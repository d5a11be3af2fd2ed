"""``symprune list`` lists every method and recipe."""

from __future__ import annotations

import subprocess
import sys
from pkgutil import resolve_name

import pytest

from symprune_lightning.cli.list import BASES
from symprune_lightning.cli.recipes import recipe_files
from symprune_lightning.functional.registry import leaves


def methods():
    """Names of the methods of the package; other tests may have defined some."""
    bases = [resolve_name(f"symprune_lightning.functional.{base}") for base in BASES.values()]
    found = [method for base in bases for method in leaves(base)]
    return {x.__name__ for x in found if x.__module__.startswith("symprune_lightning.")}


@pytest.mark.parametrize("columns", [60, 200])
def test_methods_and_recipes(symprune, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    symprune("list")
    text = capsys.readouterr().out
    rows = {line.split()[1] for line in text.splitlines() if line.startswith("│")}
    for name in ("SymWanda", "R2DSnoT", "OBSUpdate", "SparseGPT", "OWL", "Search", "NM"):
        assert name in rows
    assert methods() <= rows
    assert set(recipe_files()) <= rows
    # on one line, however long, so that it can be copied
    assert f"recipes in {recipe_files()['ria'].parent}\n" in text
    assert "`" not in text


def test_arguments_are_refused(symprune):
    with pytest.raises(SystemExit, match="2"):
        symprune("list", "scores")


def test_torch_is_not_imported(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONUTF8", "1")
    code = (
        "import sys\n"
        "from symprune_lightning.cli.list import list_methods\n"
        "list_methods()\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    names = {line.split()[1] for line in text.splitlines() if line.startswith("│")}
    assert names == methods() | set(recipe_files())
