"""What a person at a terminal sees: a bar over the layers, a table at the end."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from symprune_lightning.engine.result import LayerReport, PruneResult
from symprune_lightning.engine.result import Progress as OnLayer


@contextmanager
def layer_bar(console: Console) -> Iterator[OnLayer]:
    """A progress bar with the time left; yields what to call after each layer."""
    columns = (
        TextColumn("[bold]pruning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[used]}"),
    )
    start = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("collecting inputs", total=None, used="")

        def on_layer(report: LayerReport, done: int, total: int) -> None:
            used = f"{_speed(report, done / total, start)}{peak_memory()}"
            progress.update(task, completed=done, total=total, description=report.name, used=used)

        yield on_layer


def block_lines(console: Console) -> OnLayer:
    """What to call after each layer to have a line for each decoder block, as logs want it."""
    start = time.monotonic()
    errors: list[float] = []
    before: list[LayerReport] = []

    def line(done: int, total: int) -> None:
        taken = time.monotonic() - start
        mean = f"error {sum(errors) / len(errors):.5f}  " if errors else ""
        console.print(
            f"pruned {done:>4} of {total} layers  {_block(before[-1].name):<24}{mean}"
            f"{taken:.0f} s, {taken / done * (total - done):.0f} s left  "
            f"{_speed(before[-1], done / total, start)}{peak_memory()}",
            highlight=False,
        )
        errors.clear()

    def on_layer(report: LayerReport, done: int, total: int) -> None:
        if before and _block(before[-1].name) != _block(report.name):
            line(done - 1, total)
        before.append(report)
        if report.error_refined is not None:
            errors.append(report.error_refined)
        if done == total:
            line(done, total)

    return on_layer


def _speed(report: LayerReport, part: float, start: float) -> str:
    """Calibration tokens a second through the whole model, by the part that is done."""
    seconds = max(time.monotonic() - start, 1e-9)
    return f"{report.tokens * part / seconds:,.0f} tokens/s  " if report.tokens else ""


def peak_memory() -> str:
    """The most memory that this process has had, on the GPU if there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kilobytes / (1024 if sys.platform == 'darwin' else 1) / 2**20:.2f} GiB"


def _block(layer: str) -> str:
    """The name up to the first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    found = re.match(r".*?\.\d+(?=\.|$)", layer)
    return found.group() if found else layer


def summary(
    result: PruneResult, dense: Mapping[str, float], sparse: Mapping[str, float]
) -> list[Table]:
    """Tables of a run: one row per layer type, and the metrics before and after.

    Args:
        result: Of ``prune_model``.
        dense: Metrics of the dense model; may be empty.
        sparse: Metrics of the pruned model; may be empty.
    """
    layers = Table(title="Pruned layers")
    for heading in ("layer type", "layers", "weights", "sparsity", "error", "refined"):
        layers.add_column(heading, justify="left" if heading == "layer type" else "right")
    by_type: defaultdict[str, list[LayerReport]] = defaultdict(list)
    for report in result.layers:
        by_type[report.name.rsplit(".", 1)[-1]].append(report)
    for kind, reports in by_type.items():
        layers.add_row(kind, *_figures(reports))
    layers.add_section()
    layers.add_row("all", *_figures(result.layers))
    if not sparse:
        return [layers]
    metrics = Table(title="Evaluation")
    metrics.add_column("metric")
    metrics.add_column("dense", justify="right")
    metrics.add_column("pruned", justify="right")
    for name, value in sparse.items():
        before = f"{dense[name]:.4f}" if name in dense else "–"
        metrics.add_row(name, before, f"{value:.4f}")
    return [layers, metrics]


def _figures(reports: Sequence[LayerReport]) -> list[str]:
    weights = [r.shape[0] * r.shape[1] for r in reports]
    zeros = sum(r.sparsity * n for r, n in zip(reports, weights, strict=True))
    return [
        f"{len(reports)}",
        f"{sum(weights):,}",
        f"{zeros / sum(weights):.4f}",
        _mean([r.error for r in reports]),
        _mean([r.error_refined for r in reports]),
    ]


def _mean(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.5f}" if known else "–"
