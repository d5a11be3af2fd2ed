"""Output of the benchmarks: each prints a section of docs/benchmarks.md, see ``make bench``.

python benchmarks/tables.py      # the top of the page: machine and versions
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "lightning", "safetensors", "greenlet")


def section(title: str, about: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a heading, a paragraph and a table; the first column is text, the others figures."""
    print(f"\n## {title}\n\n{about}\n")
    for row in (heading, ("---", *["---:"] * (len(heading) - 1)), *rows):
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


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
        "Each section is the output of a script of `benchmarks/`; `make bench` runs all of them.\n"
    )
    print(f"{processor()}, {os.cpu_count()} cores, no GPU used; {platform.system()},", end=" ")
    print(f"Python {platform.python_version()}, {versions}.")


if __name__ == "__main__":
    main()
