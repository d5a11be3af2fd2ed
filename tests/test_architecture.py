"""Rooms of the package import only what the table of docs/architecture.md lets them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import symprune_lightning

PACKAGE = "symprune_lightning"
ROOT = Path(symprune_lightning.__file__).parent
LIGHTNING = {"lightning", "torch", "torchmetrics", "transformers", "datasets", "rich"}
CORE = {f"{PACKAGE}.functional", f"{PACKAGE}.engine"}
ALLOWED = {
    "functional": {"torch", "scipy", f"{PACKAGE}.functional"},
    "files": set(),
    "engine": {"torch", "greenlet", "safetensors", f"{PACKAGE}.files", *CORE},
    "display": {"rich", "torch", *CORE},
    "pretrained": {"torch", "transformers"},
    "masks": {"torch", "safetensors", f"{PACKAGE}.files", *CORE},
    "callbacks": LIGHTNING
    | CORE
    | {f"{PACKAGE}.{room}" for room in ("display", "masks", "callbacks")}
    | {"typing_extensions"},
    "module": LIGHTNING | CORE | {f"{PACKAGE}.pretrained"},
    "datamodule": LIGHTNING | CORE | {f"{PACKAGE}.pretrained"},
    "card": {"huggingface_hub"},
    "export": {
        "torch",
        "safetensors",
        "transformers",
        *(f"{PACKAGE}.{room}" for room in ("card", "files", "masks")),
        *CORE,
    },
    "streaming": {
        "accelerate",
        "huggingface_hub",
        "safetensors",
        "torch",
        "transformers",
        f"{PACKAGE}.export",
        f"{PACKAGE}.files",
        f"{PACKAGE}.masks",
        *CORE,
    },
    "trainer": LIGHTNING | {PACKAGE},
    "report": LIGHTNING
    | CORE
    | {"matplotlib", "jinja2"}
    | {f"{PACKAGE}.{room}" for room in ("callbacks", "display", "export", "files", "report")},
    "zero_shot": LIGHTNING | {"lm_eval", f"{PACKAGE}.callbacks"},
    "adapters": {"torch", *CORE},
    "apply": {f"{PACKAGE}.{room}" for room in ("export", "masks", "pretrained")},
    "verify": LIGHTNING | {PACKAGE, "safetensors"},
    "recipes": LIGHTNING | {PACKAGE},
    "compare": LIGHTNING | {PACKAGE, "matplotlib", "yaml"},
    "cli": LIGHTNING | {PACKAGE, "jsonargparse"},
    "__init__": {PACKAGE},
}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module or "")
    return names


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_in_their_rooms(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    outside = {
        name
        for name in imported(path)
        if name.split(".")[0] not in sys.stdlib_module_names and not within(name, ALLOWED[room])
    }
    assert not outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_parallel_names_torch_distributed(path: Path) -> None:
    if path.name != "parallel.py":
        assert not {n for n in imported(path) if n.startswith("torch.distributed")}


def test_every_room_is_in_the_table() -> None:
    assert {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} == set(ALLOWED)


def test_only_one_file_names_torch_distributed():
    for path in FILES:
        names = {n for n in imported(path) if n.startswith("torch.distributed")}
        text = path.read_text()
        named = names or "from torch import distributed" in text or "torch.distributed." in text
        assert not named or path.name == "parallel.py", path
