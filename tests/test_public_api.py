"""The public API is the one recorded in tests/public_api.txt.

After an intended change: ``python -m tests.test_public_api`` and commit the file with a changelog
entry.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import symprune_lightning
from symprune_lightning.checkpoints.manifest import build_manifest
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.result import LayerReport, PruneResult

SNAPSHOT = Path(__file__).parent / "public_api.txt"


def names() -> Iterator[str]:
    for name in sorted(symprune_lightning.__all__):
        public = getattr(symprune_lightning, name)
        if inspect.isclass(public) and not issubclass(public, Exception):
            yield f"class {name}{signature(public)}"
            for member, value in sorted(vars(public).items()):
                if not member.startswith("_") and callable(getattr(value, "__func__", value)):
                    yield f"    {name}.{member}{signature(getattr(public, member))}"
        elif inspect.isclass(public):
            yield f"exception {name}({public.__base__.__name__})"
        else:
            yield f"def {name}{signature(public)}"


def signature(value: object) -> str:
    """Argument names and defaults; annotations are left to mypy."""
    parameters = inspect.signature(value).parameters.values()
    text = str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def options() -> Iterator[str]:
    """Options of ``symprune prune`` that are ours, not those of Lightning's Trainer."""
    command = [sys.executable, "-m", "symprune_lightning.cli.main", "prune"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    subclass = subprocess.run(
        [*command, "--pruning.help"], capture_output=True, text=True, check=True
    )
    text = done.stdout + subclass.stdout
    for option in sorted(set(re.findall(r"--[\w.]+", text))):
        if not option.startswith(("--trainer", "--help")):
            yield f"symprune prune {option}"


def manifest_keys() -> Iterator[str]:
    for key in build_manifest(PruneResult(), model="", settings={}):
        yield f"manifest {key}"
    for field in fields(LayerReport):
        yield f"manifest layers[].{field.name}"


def snapshot() -> str:
    hooks = [f"hook {name}" for name in vars(PruningHooks) if name.startswith("on_")]
    return "\n".join([*names(), *hooks, *manifest_keys(), *options()]) + "\n"


def test_public_api_is_the_recorded_one():
    assert snapshot() == SNAPSHOT.read_text(), (
        "the public API has changed: if intended, run `python -m tests.test_public_api`"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
