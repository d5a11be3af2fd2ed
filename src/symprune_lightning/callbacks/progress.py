"""Progress of a run on the terminal, and summary tables."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Trainer
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
from torch import Tensor

from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.result import BlockReport, LayerReport, PruneResult


class LayerBar(PruningHooks):
    """A progress bar over the layers, with the remaining time.

    Args:
        progress: A started progress display of rich.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start = time.monotonic()
        self._done = self._total = 0
        self._task = progress.add_task("collecting inputs", total=None, usage="")

    def on_pruning_start(self, layers: Sequence[str]) -> None:
        """See `PruningHooks`."""
        self._total = len(layers)

    def on_resume(self, folder: Path, layers: Sequence[str]) -> None:
        """See `PruningHooks`."""
        self._progress.console.print(resume_line(folder, len(layers), self._total))

    def on_layer_pruned(self, report: LayerReport, mask: Tensor) -> None:
        """See `PruningHooks`."""
        self._done += 1
        usage = f"{_throughput(report, self._done / self._total, self._start)}{peak_memory()}"
        self._progress.update(
            self._task,
            completed=self._done,
            total=self._total,
            description=report.name,
            usage=usage,
        )

    def on_reconstruction_epoch(self, block: str, epoch: int, error: float) -> None:
        """See `PruningHooks`."""
        description = f"reconstructing {block}, epoch {epoch}, held-out error {error:.5f}"
        self._progress.update(self._task, description=description)


class BlockLines(PruningHooks):
    """One line of log for each decoder block.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._errors: list[float] = []
        self._last: LayerReport | None = None
        self._restored: set[str] = set()
        self._done = self._total = 0

    def on_pruning_start(self, layers: Sequence[str]) -> None:
        """See `PruningHooks`."""
        self._total = len(layers)

    def on_resume(self, folder: Path, layers: Sequence[str]) -> None:
        """See `PruningHooks`."""
        self._restored = set(layers)
        line = resume_line(folder, len(layers), self._total)
        self._console.print(line, highlight=False, soft_wrap=True)

    def on_layer_pruned(self, report: LayerReport, mask: Tensor) -> None:
        """See `PruningHooks`."""
        if report.name not in self._restored:
            self._add(report)
        self._done += 1
        if self._done == self._total:
            self._print_line()

    def _add(self, report: LayerReport) -> None:
        """Add a layer that this run has pruned to the line of its block."""
        if self._last is not None and block_name(self._last.name) != block_name(report.name):
            self._print_line()
        self._last = report
        if report.final_error is not None:
            self._errors.append(report.final_error)

    def on_block_reconstructed(self, report: BlockReport) -> None:
        """See `PruningHooks`."""
        self._print_line()
        self._console.print(
            f"reconstructed {report.name:<31} held-out error {report.error:.5f} to "
            f"{report.error_reconstructed:.5f}  {len(report.errors) - 1} epochs, "
            f"{report.seconds:.0f} s",
            highlight=False,
        )

    def _print_line(self) -> None:
        """Print the line of the last block, unless it was printed already."""
        last, self._last = self._last, None
        if last is None:
            return
        done, total = self._done, self._total
        pruned = max(done - len(self._restored), 1)
        elapsed = time.monotonic() - self._start
        errors = self._errors
        mean = f"error {sum(errors) / len(errors):.5f}  " if errors else ""
        self._console.print(
            f"pruned {done:>4} of {total} layers  {block_name(last.name):<24}{mean}"
            f"{elapsed:.0f} s, {elapsed / pruned * (total - done):.0f} s left  "
            f"{_throughput(last, pruned / total, self._start)}{peak_memory()}",
            highlight=False,
        )
        errors.clear()


def resume_line(folder: Path, finished: int, total: int) -> str:
    """Return the line that announces a resumed run."""
    return f"resuming from {folder}: {finished} of {total} layers are recorded"


@contextmanager
def progress_hooks(trainer: Trainer) -> Iterator[list[PruningHooks]]:
    """Progress bar on a terminal, one log line per block otherwise, nothing when disabled."""
    if not trainer.is_global_zero or trainer.progress_bar_callback is None:
        yield []
    elif is_interactive(trainer):
        columns = (
            TextColumn("[bold]pruning"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[usage]}"),
        )
        with Progress(*columns, console=Console(), transient=True) as progress:
            yield [LayerBar(progress)]
    else:
        yield [BlockLines(Console(stderr=True, width=120))]


def is_interactive(trainer: Trainer) -> bool:
    """Return whether output is interactive: rank 0, a terminal, progress bars enabled."""
    enabled = trainer.progress_bar_callback is not None
    return trainer.is_global_zero and enabled and Console().is_terminal


def print_summary(
    trainer: Trainer, result: PruneResult, dense: Mapping[str, float], sparse: Mapping[str, float]
) -> None:
    """Print the summary tables if the output is interactive."""
    if is_interactive(trainer):
        for table in summary(result, dense, sparse):
            Console().print(table)


def summary(
    result: PruneResult, dense: Mapping[str, float], sparse: Mapping[str, float]
) -> list[Table]:
    """Return the tables of a run: one row per layer type, and the metrics before and after.

    Args:
        result: Result of ``prune_model``.
        dense: Metrics of the dense model; may be empty.
        sparse: Metrics of the pruned model; may be empty.
    """
    layers = Table(title="Pruned layers")
    is_refined = any(report.swaps for report in result.layers)
    headings = ("layer type", "layers", "weights", "sparsity", "error")
    for heading in (*headings, *["refined"] * is_refined):
        layers.add_column(heading, justify="left" if heading == "layer type" else "right")
    by_type: defaultdict[str, list[LayerReport]] = defaultdict(list)
    for report in result.layers:
        by_type[_layer_type(report.name)].append(report)
    for layer_type, reports in by_type.items():
        layers.add_row(layer_type, *_cells(reports, is_refined))
    layers.add_section()
    layers.add_row("all", *_cells(result.layers, is_refined))
    layers.caption = "\n".join(filter(None, [_describe_coverage(result), result.sparse_start]))
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


def peak_memory() -> str:
    """Return the peak memory of this process, on the GPU if there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes
    return f"{kilobytes / (1024 if sys.platform == 'darwin' else 1) / 2**20:.2f} GiB"


def block_name(layer: str) -> str:
    """Return the name up to the first number: ``model.layers.3`` of ``model.layers.3.mlp.up``."""
    match = re.match(r".*?\.\d+(?=\.|$)", layer)
    return match.group() if match else layer


def _throughput(report: LayerReport, fraction: float, start: float) -> str:
    """Format calibration tokens per second through the full model, from the finished fraction."""
    seconds = max(time.monotonic() - start, 1e-9)
    return f"{report.tokens * fraction / seconds:,.0f} tokens/s  " if report.tokens else ""


def _layer_type(name: str) -> str:
    """Return the last component of a name that is not the number of an expert or a group."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    return parts[-1] if parts else name


def _describe_coverage(result: PruneResult) -> str:
    """Describe which weights of the decoder blocks the pruned layers hold."""
    text = f"{result.coverage:.1%} of the weights of the blocks are in pruned layers"
    in_blocks = [weight for weight in result.left_dense if weight.in_block]
    largest = ", ".join(f"{w.name} ({w.reason})" for w in in_blocks[:2])
    return f"{text}; dense: {largest}" if result.coverage < 0.95 and largest else text


def _cells(reports: Sequence[LayerReport], is_refined: bool) -> list[str]:
    weights = sum(report.num_weights for report in reports)
    zeros = sum(report.num_zeros for report in reports)
    return [
        f"{len(reports)}",
        f"{weights:,}",
        f"{zeros / weights:.4f}",
        _mean([report.error for report in reports]),
        *[_mean([report.error_refined for report in reports])] * is_refined,
    ]


def _mean(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.5f}" if known else "–"
