"""What the benchmarks print: each a section of docs/benchmarks.md, which ``make bench`` writes.

python benchmarks/tables.py      # the head of the page: machine and versions
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
    """Two cells of a table."""
    return f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} – {max(ratios):.2f}"


def say(what: str) -> None:
    """Progress, which is no part of the page."""
    print(what, file=sys.stderr, flush=True)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print("# Benchmarks\n")
    print("Each section is what a script of `benchmarks/` printed; `make bench` runs them all.\n")
    print(f"{processor()}, {os.cpu_count()} cores, no GPU used; {platform.system()},", end=" ")
    print(f"Python {platform.python_version()}, {versions}.")


if __name__ == "__main__":
    main()
