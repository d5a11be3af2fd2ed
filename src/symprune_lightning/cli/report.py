"""``symprune report``: methods, figures and recommendations of checkpoints side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from symprune_lightning.callbacks.report.summary import advice, asked, outcome, perplexities
from symprune_lightning.checkpoints.manifest import MANIFEST, read_manifest
from symprune_lightning.engine.result import LayerReport

Manifest = Mapping[str, Any]


def print_report(folders: Sequence[str], console: Console | None = None) -> None:
    """Print the figures of pruned checkpoints, a column for each.

    Args:
        folders: Checkpoints written by this package.
        console: Where to print; the terminal by default.

    Raises:
        FileNotFoundError: A folder has no manifest.
        ValueError: A manifest cannot be read.
    """
    console = console or Console()
    manifests = {folder: _read(folder) for folder in folders}
    console.print(table(manifests))
    for folder, manifest in manifests.items():
        lines = [f"\n{folder}", f"method: {asked(manifest)}", *outcome(manifest)]
        lines += [f"- {sentence}" for sentence in advice(manifest)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _read(folder: str) -> Manifest:
    path = Path(folder).expanduser()
    try:
        return read_manifest(path)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: pass folders of pruned checkpoints"
        ) from error


def table(manifests: Mapping[str, Manifest]) -> Table:
    """Return the figures with a row for each and a column per checkpoint."""
    rows = {name: figures(manifest) for name, manifest in manifests.items()}
    result = Table("", box=None, pad_edge=False)
    for name in rows:
        result.add_column(name, justify="right", overflow="fold")
    for figure in dict.fromkeys(figure for column in rows.values() for figure in column):
        result.add_row(figure, *(column.get(figure, "–") for column in rows.values()))
    return result


def figures(manifest: Manifest) -> dict[str, str]:
    """Return the figures of a checkpoint by name, formatted.

    Examples:
        >>> from dataclasses import asdict
        >>> metrics = {"dense": {"val_perplexity": 10.0}, "pruned": {"val_perplexity": 12.0}}
        >>> layers = [asdict(LayerReport("fc", (4, 8), 0.5, 0.5, 0.3, 0.1, None, 3, 64, 1.0))]
        >>> run = {"sparsity": 0.5, "metrics": metrics, "layers": layers}
        >>> run["coverage"] = {"fraction": 1.0}
        >>> figures(run)["val_perplexity, × dense"], figures(run)["error of the layers, mean"]
        ('1.200', '0.1000')
    """
    found = {
        "sparsity": f"{manifest['sparsity']:.4f}",
        "coverage of the blocks": f"{manifest['coverage']['fraction']:.3f}",
    }
    for name, (dense, pruned) in perplexities(manifest).items():
        found |= {f"{name}, dense": f"{dense:.3f}", f"{name}, pruned": f"{pruned:.3f}"}
        found[f"{name}, × dense"] = f"{pruned / dense:.3f}"
    errors = [LayerReport(**layer).final_error for layer in manifest["layers"]]
    known = [error for error in errors if error is not None]
    if known:
        found["error of the layers, mean"] = f"{sum(known) / len(known):.4f}"
    found["seconds for scores and masks"] = f"{sum(x['seconds'] for x in manifest['layers']):.1f}"
    return found
