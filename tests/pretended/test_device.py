"""Every method on a pretended GPU: no mistake with devices, and few copies to the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretended.runs import ORDERS, methods

MAX_COPIES = {"DSnoT": 26, "R2DSnoT": 26, "MaskedCG": 21, "ADMM": 20}
"""Copies to the host for each layer; each iteration of these asks whether it is the last."""

MAX_COPIES_OF_OTHERS = 13


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if shutil.which("g++") is None:
        pytest.skip("the pretended device needs g++")
    folder: Path = tmp_path_factory.mktemp("pretended")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.pretended.runs", str(folder)]
    subprocess.run(command, check=True, env=environment)
    read: dict[str, Any] = json.loads((folder / "runs.json").read_text())
    return read


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", methods())
def test_a_method(runs, name, order):
    run = runs[f"{name}, {order}"]
    assert "error" not in run, run
    assert run["masks"]
    assert run["weights"]
    copies = (run["copies"] - 2 * run["batches"]) / run["layers"]
    assert copies <= MAX_COPIES.get(name, MAX_COPIES_OF_OTHERS)


def test_every_method_was_run(runs):
    assert len(runs) == len(methods()) * len(ORDERS)
