"""Figures of a report.

Backgrounds are transparent and colors readable on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symprune_lightning.callbacks.report.curves import (
    LayerReports,
    curves_of,
    kinds_of,
    tokens_by_expert,
)

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.figure import Figure

GRAY, BLUE, ORANGE = "#888888", "#4a90d9", "#e08a3c"
BINS = 60
CROP = 96
"""Number of rows and columns shown of a mask."""
MAX_LAYERS = 6
"""Maximum number of layers whose scores and masks are shown."""
WIDTH, FONT = 5.5, 11
"""Width of a figure in inches and size of its letters in points: legible on a phone."""
SAME = 0.005
"""Sparsities that differ by less are not drawn."""

ERRORS = (
    ("error", "error by the mask of the score"),
    ("error_refined", "error by the refined mask"),
    ("error_updated", "error with updated weights"),
)
"""Entries of a layer report, and the titles of their panels."""


@dataclass(frozen=True)
class Histogram:
    """Distribution of the scores of a layer, on a logarithmic axis.

    Attributes:
        low: Lower edge of the first bin, as the decimal logarithm of the score.
        high: Upper edge of the last bin, as the decimal logarithm of the score.
        kept: For each bin, the kept weights in it as a fraction of all weights that are counted.
        pruned: For each bin, the pruned weights in it as a fraction of all that are counted.
    """

    low: float
    high: float
    kept: list[float]
    pruned: list[float]


def histogram(scores: Tensor, mask: Tensor, sample: int = 50_000) -> Histogram | None:
    """Compute the histogram of a sample of scores.

    Args:
        scores: Scores of a layer, any shape. Only finite, positive scores are counted.
        mask: Boolean mask of the same shape; ``True`` for kept weights.
        sample: Approximate number of scores to use. Default: 50,000.

    Returns:
        The histogram, or ``None`` if all counted scores are equal or there are none.

    Examples:
        >>> scores = torch.logspace(-2, 2, 1001)
        >>> distribution = histogram(scores, mask=scores > 1)
        >>> round(sum(distribution.kept), 1), round(sum(distribution.pruned), 1)
        (0.5, 0.5)
    """
    stride = max(1, scores.numel() // sample)
    values, kept = scores.flatten()[::stride], mask.flatten()[::stride]
    valid = values.isfinite() & (values > 0)
    logs, kept = values[valid].double().log10(), kept[valid]
    if not len(logs):
        return None
    # a few scores close to 0 would stretch the logarithmic axis over many empty decades
    low, high = float(logs.quantile(0.005)), float(logs.max())
    if high - low < 1e-6:
        return None
    counts = [logs[kept].histc(BINS, low, high), logs[~kept].histc(BINS, low, high)]
    fractions = [(count / len(logs)).tolist() for count in counts]
    return Histogram(low, high, *fractions)


def figures(
    layers: LayerReports,
    masks: Mapping[str, Tensor],
    histograms: Mapping[str, Histogram],
    times: Mapping[str, float],
    blocks: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Figure]:
    """Draw the figures of a report; figures without data are left out.

    Args:
        layers: Layer reports of the manifest, in the order of pruning.
        masks: Mapping of layer names to masks, shape ``(out_features, in_features)``; may be empty.
        histograms: Mapping of layer names to histograms of their scores; may be empty.
        times: Mapping of the phases of the run to their duration in seconds; may be empty.
        blocks: Reports of the reconstructed blocks, the entry ``blocks`` of the manifest.

    Returns:
        Figures by name: ``"sparsity"``, ``"error"``, ``"swaps"``, ``"reconstruction"``, ``"time"``,
        ``"experts"``, ``"scores"`` and ``"masks"``.
    """
    drawn = {}
    sparsities = [float(layer["sparsity"]) for layer in layers]
    if sparsities and max(sparsities) - min(sparsities) > SAME:
        drawn["sparsity"] = _layer_plot(layers, [("sparsity", "fraction of zeros")])
    is_refined = any(layer.get("swaps") for layer in layers)
    errors = [
        (key, title)
        for key, title in ERRORS
        # without a refiner, the refined mask is that of the score
        if (is_refined or key != "error_refined")
        and any(layer.get(key) is not None for layer in layers)
    ]
    if errors:
        drawn["error"] = _layer_plot(layers, errors)
    if is_refined:
        drawn["swaps"] = _layer_plot(layers, [("swaps", "swaps by the refiner")])
    experts = tokens_by_expert(layers)
    if experts:
        drawn["experts"] = _heat_map(experts)
    if blocks:
        drawn["reconstruction"] = _reconstruction_plot(blocks)
    if times:
        drawn["time"] = _bar_chart(times)
    chosen = chosen_layers([str(layer["name"]) for layer in layers])
    names = [name for name in chosen if name in histograms]
    if names:
        drawn["scores"] = _grid(names, lambda axes, name: _draw_histogram(axes, histograms[name]))
    names = [name for name in chosen if name in masks]
    if names:
        drawn["masks"] = _grid(names, lambda axes, name: _draw_mask(axes, masks[name]))
    return drawn


def chosen_layers(names: Sequence[str]) -> list[str]:
    """Return at most six layer names, evenly spaced from the first to the last.

    Examples:
        >>> chosen_layers([str(i) for i in range(11)])
        ['0', '2', '4', '6', '8', '10']
    """
    indices = torch.linspace(0, len(names) - 1, min(MAX_LAYERS, len(names))).round().int().tolist()
    return list(dict.fromkeys(names[index] for index in indices))


def png(figure: Figure) -> bytes:
    """Return a figure as the contents of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, transparent=True)
    return buffer.getvalue()


def _figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _color_map(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def _axes(figure: Figure, *position: int) -> Any:
    """Add axes in neutral colors to a figure, at a position as in ``add_subplot``."""
    axes = figure.add_subplot(*(position or (1, 1, 1)))
    for spine in axes.spines.values():
        spine.set_color(GRAY)
    axes.tick_params(colors=GRAY, labelsize=FONT)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(GRAY)
    return axes


def _layer_plot(layers: LayerReports, panels: Sequence[tuple[str, str]]) -> Figure:
    """Plot values over the blocks, a line per kind of layer and a panel per entry of the report."""
    kinds = list(dict.fromkeys(kind for kind, _ in kinds_of(layers).values()))
    figure = _figure((WIDTH, 0.8 + 2.4 * len(panels) + 0.12 * len(kinds)))
    colors = _color_map("tab10" if len(kinds) <= 10 else "tab20")
    for i, (key, title) in enumerate(panels):
        axes = _axes(figure, len(panels), 1, i + 1)
        axes.set_title(title, fontsize=FONT)
        for kind, curve in curves_of(layers, key).items():
            color = colors(kinds.index(kind) % colors.N)
            axes.plot(list(curve), list(curve.values()), ".-", color=color, label=kind, lw=1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("block", fontsize=FONT)
    if len(kinds) > 1:
        lines = [line for panel in figure.axes for line in panel.get_lines()]
        handles = {str(line.get_label()): line for line in lines}
        style = {"labelcolor": GRAY, "fontsize": FONT - 1, "ncols": 2, "frameon": False}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", **style)
    return figure


def _reconstruction_plot(blocks: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot a curve per block: its held-out error by epoch, relative to that before training."""
    figure = _figure((WIDTH, 3))
    axes = _axes(figure)
    colors = _color_map("viridis")
    for i, block in enumerate(blocks):
        errors = block["errors"]
        color = colors(i / max(len(blocks) - 1, 1))
        ends = i in (0, len(blocks) - 1)
        label = block["name"] if ends else None
        before = errors[0] or 1.0  # 0 for a block of which no weight was pruned
        axes.plot([e / before for e in errors], color=color, linewidth=1, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _describe_lines(axes, "epochs", "held-out error, relative", legend=True)
    return figure


def _describe_lines(axes: Any, horizontal: str, vertical: str, *, legend: bool) -> None:
    """Label axes with lines, which start at 0, and add a legend if requested."""
    axes.set_xlabel(horizontal, fontsize=FONT)
    axes.set_ylabel(vertical, fontsize=FONT)
    axes.set_ylim(bottom=0)
    if legend:
        axes.legend(frameon=False, labelcolor=GRAY, fontsize=FONT)


def _heat_map(experts: Mapping[str, Sequence[int]]) -> Figure:
    """Show the tokens of every expert: a row for each parameter that holds experts."""
    width = max(len(counts) for counts in experts.values())
    rows = [[*counts, *[float("nan")] * (width - len(counts))] for counts in experts.values()]
    figure = _figure((WIDTH, 1.0 + 0.24 * len(rows)))
    axes = _axes(figure)
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [".".join(name.split(".")[-4:]) for name in experts])
    axes.tick_params(axis="y", labelsize=FONT - 2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("expert", fontsize=FONT)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(colors=GRAY, labelsize=FONT - 1)
    bar.set_label("calibration tokens", color=GRAY, fontsize=FONT)
    return figure


def _bar_chart(times: Mapping[str, float]) -> Figure:
    figure = _figure((WIDTH, 0.6 + 0.36 * len(times)))
    axes = _axes(figure)
    names = list(times)[::-1]
    bars = axes.barh(names, [times[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.1f s", color=GRAY, fontsize=FONT, padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds", fontsize=FONT)
    return figure


def _grid(names: Sequence[str], draw: Callable[[Any, str], None]) -> Figure:
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = _figure((WIDTH, 2.5 * rows))
    for i, name in enumerate(names):
        axes = _axes(figure, rows, columns, i + 1)
        axes.set_title(".".join(name.split(".")[-4:]), fontsize=FONT - 1)
        draw(axes, name)
    return figure


def _draw_histogram(axes: Any, scores: Histogram) -> None:
    width = (scores.high - scores.low) / BINS
    edges = [scores.low + i * width for i in range(BINS)]
    axes.bar(edges, scores.pruned, width, align="edge", color=ORANGE, label="pruned")
    axes.bar(
        edges, scores.kept, width, align="edge", color=BLUE, label="kept", bottom=scores.pruned
    )
    axes.set_yticks([])
    axes.set_xlabel("log₁₀ score", fontsize=FONT - 1)
    axes.legend(frameon=False, labelcolor=GRAY, fontsize=FONT - 1)


def _draw_mask(axes: Any, mask: Tensor) -> None:
    shades = torch.where(mask[:CROP, :CROP].cpu(), 1.0, 0.25)
    axes.imshow(shades.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
