"""Output of the benchmarks: each prints a section of docs/benchmarks.md, see ``make bench``.

python benchmarks/tables.py      # the top of the page: machine and versions
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUIET_TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of ``Trainer`` for studies of many runs."""

PACKAGES = ("torch", "transformers", "lightning", "safetensors", "greenlet")


def section(title: str, about: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a heading, a paragraph and a table; the first column is text, the others figures."""
    print(f"\n## {title}\n\n{about}\n")
    for row in (heading, ("---", *["---:"] * (len(heading) - 1)), *rows):
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def append_row(path: Path, fields: Sequence[str], values: Sequence[object]) -> None:
    """Append a row to a CSV file, after its header if the file is new, and print it."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(fields)
        writer.writerow(values)
    print(*values, flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def median_and_range(ratios: Sequence[float]) -> tuple[str, str]:
    """Return median and range as two cells of a table."""
    return f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} – {max(ratios):.2f}"


def log(message: str) -> None:
    """Print progress, which is not part of the page."""
    print(message, file=sys.stderr, flush=True)


def processor() -> str:
    """Return the name of the processor, from ``/proc/cpuinfo`` if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print("# Benchmarks\n")
    print(
        "Each section but the last, which is `benchmarks/notes.md`, is the output of a script of "
        "`benchmarks/`; `make bench` runs all of them.\n"
    )
    print(f"{processor()}, {os.cpu_count()} cores, no GPU used; {platform.system()},", end=" ")
    print(f"Python {platform.python_version()}, {versions}.")


if __name__ == "__main__":
    main()
