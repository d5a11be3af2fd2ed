"""Import rules of the package, read from the table in docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import symprune_lightning

PACKAGE = "symprune_lightning"
ROOT = Path(symprune_lightning.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
FILES = sorted(ROOT.rglob("*.py"))
LONGEST_CHAIN = 13
MAX_LINES = 300


def table() -> dict[str, set[str]]:
    """Row of the table (``functional/``, ``trainer``) to what its files may import."""
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]*\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE)
    return {
        name.rstrip("/"): {x.rstrip("/") for x in re.findall(r"`([\w/]+)`", allowed)}
        for name, allowed in rows
    }


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def import_names(tree: ast.AST) -> Iterator[str]:
    """Full names of what a tree imports: modules, and names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def row_of(name: str) -> str:
    """Row of the table that a module of the package belongs to."""
    row = ".".join(name.split(".")[:2])
    known = any(module == row or module.startswith(f"{row}.") for module in MODULES)
    return row.removeprefix(f"{PACKAGE}.") if known and row != PACKAGE else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    row = row_of(module_name(path))
    allowed = table()[row] | {row}
    for name in import_names(ast.parse(path.read_text())):
        top = name.split(".")[0]
        if top == PACKAGE:
            assert row_of(name) in allowed | {"__init__"}, f"{row} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in allowed, f"{row} imports {top}"


def test_every_row_of_the_table_exists_and_is_minimal():
    imported: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        used = imported.setdefault(row_of(name), set())
        for other in import_names(ast.parse(path.read_text())):
            top = other.split(".")[0]
            used.add(row_of(other) if top == PACKAGE else top)
    assert table().keys() == imported.keys()
    for row, allowed in table().items():
        assert not allowed - imported[row], f"{row} may import more than it does"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_engine_distributed_uses_torch_distributed(path):
    if "distributed" not in path.relative_to(ROOT).parts:
        assert "torch.distributed" not in set(import_names(ast.parse(path.read_text())))
        assert "torch.distributed." not in path.read_text()


@cache
def dependencies(name: str) -> frozenset[str]:
    """Modules that a module imports when it is imported, also under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.parse(MODULES[name].read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            names |= {other for other in import_names(node) if other in MODULES}
    return frozenset(names - {name})


def chains(name: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    assert name not in above, f"import cycle: {' > '.join((*above, name))}"
    return longest(name, above)


def longest(name: str, above: tuple[str, ...]) -> tuple[str, ...]:
    below = [chains(other, (*above, name)) for other in dependencies(name)]
    return (name, *max(below, key=len, default=()))


def test_no_import_cycles_and_no_long_chains():
    chain = max((chains(name) for name in MODULES), key=len)
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_long_files_say_why(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= MAX_LINES or f"Longer than {MAX_LINES} lines" in docstring


def modules_after(statement: str) -> set[str]:
    command = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_prune_model_is_imported_without_lightning():
    loaded = modules_after("from symprune_lightning import prune_model")
    assert "symprune_lightning.engine.prune" in loaded
    heavy = {"lightning", "transformers", "datasets", "accelerate", "torchmetrics", "rich"}
    assert not loaded & heavy


def test_importing_the_package_loads_nothing():
    assert not modules_after("import symprune_lightning") & {"torch", "lightning"}
