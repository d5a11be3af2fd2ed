from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from symprune_lightning.cli.main import main
from tests.texts import write_project

Command = Callable[..., None]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Folder with a tiny model and texts."""
    write_project(tmp_path)
    return tmp_path


@pytest.fixture
def symprune(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process; modules it imports by path are forgotten."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["symprune", *map(str, arguments)])
        main()

    monkeypatch.setattr(sys, "path", [*sys.path])
    return run
