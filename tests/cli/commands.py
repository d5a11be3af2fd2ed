"""Command lines for the tiny model of a test, and modules of a user."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 2}

INTERRUPTING = """
import os
import signal

from lightning.pytorch import Callback

from symprune_lightning import PruningHooks


class Interrupt(Callback, PruningHooks):
    def __init__(self, layer: int, number: int = signal.SIGINT):
        self.remaining = layer
        self.number = number
        self.is_first = os.environ.get("LOCAL_RANK", "0") == "0"

    def on_layer_pruned(self, report, mask):
        self.remaining -= 1
        if self.remaining == 0 and self.is_first:
            os.kill(os.getpid(), self.number)
"""
"""A callback that sends the first process a signal after some layers, SIGINT as Ctrl+C does."""


def small(project: Path) -> list[str]:
    """Options that replace model and data of a recipe by those of a test."""
    options = {**SIZES, "dataset": project / "texts.txt"}
    data = [f"--data.{name}={value}" for name, value in options.items()]
    return [f"--model.pretrained={project / 'model'}", "--trainer.accelerator=cpu", *data]


def interrupt(layer: int, number: int = signal.SIGINT) -> list[str]:
    """Options that interrupt a run in whose folder ``interrupting.py`` is."""
    callbacks = "--trainer.callbacks"
    return [
        f"{callbacks}+=interrupting.Interrupt",
        f"{callbacks}.layer={layer}",
        f"{callbacks}.number={int(number)}",
    ]


def run_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[Any]:
    """Run the installed command in a process of its own."""
    command = [str(Path(sys.executable).parent / "symprune"), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)
