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

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.figure import Figure

GRAY, BLUE, ORANGE, GREEN = "#888888", "#4a90d9", "#e08a3c", "#3c9a6a"
BINS = 60
CROP = 96
"""Number of rows and columns shown of a mask."""
MAX_LAYERS = 6
"""Maximum number of layers whose scores and masks are shown."""

LayerReports = Sequence[Mapping[str, Any]]
"""Entry ``layers`` of the manifest: one mapping per layer, in the order of pruning."""


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
    drawn = {"sparsity": _line_plot(layers, "fraction of zeros", [("sparsity", BLUE, "sparsity")])}
    errors = [("error", ORANGE, "mask of the score"), ("error_refined", BLUE, "refined mask")]
    if any(layer.get("error_updated") is not None for layer in layers):
        errors.append(("error_updated", GREEN, "updated weights"))
    if any(layer.get("error") is not None for layer in layers):
        drawn["error"] = _line_plot(layers, "relative squared error of the layer's output", errors)
    if any(layer.get("swaps") for layer in layers):
        drawn["swaps"] = _line_plot(layers, "swaps by the refiner", [("swaps", BLUE, "swaps")])
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


def tokens_by_expert(layers: LayerReports) -> dict[str, list[int]]:
    """Return the calibration tokens of each expert, by the name that all experts share.

    Experts are layers whose names contain "expert" and end with a number.

    Args:
        layers: Layer reports of the manifest.

    Examples:
        >>> tokens_by_expert([{"name": "mlp.experts.down_proj.1", "tokens": 5}])
        {'mlp.experts.down_proj': [0, 5]}
    """
    tokens: dict[str, dict[int, int]] = {}
    for layer in layers:
        name, _, number = str(layer["name"]).rpartition(".")
        if number.isdecimal() and "expert" in name.lower() and layer["tokens"]:
            tokens.setdefault(name, {})[int(number)] = int(layer["tokens"])
    return {
        name: [counts.get(i, 0) for i in range(max(counts) + 1)] for name, counts in tokens.items()
    }


def png(figure: Figure) -> bytes:
    """Return a figure as the contents of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True)
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
    axes.tick_params(colors=GRAY, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(GRAY)
    return axes


def _line_plot(layers: LayerReports, title: str, lines: Sequence[tuple[str, str, str]]) -> Figure:
    """Plot values over the layers: a key of the report, a color and a label for each line."""
    figure = _figure((8, 2.8))
    axes = _axes(figure)
    for key, color, label in lines:
        values = [layer.get(key) for layer in layers]
        axes.plot([float("nan") if v is None else v for v in values], color=color, label=label)
    _describe_lines(axes, "layers, in the order of pruning", title, legend=len(lines) > 1)
    return figure


def _reconstruction_plot(blocks: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot a curve per block: its held-out error by epoch, relative to that before training."""
    figure = _figure((8, 2.8))
    axes = _axes(figure)
    colors = _color_map("viridis")
    for i, block in enumerate(blocks):
        errors = block["errors"]
        color = colors(i / max(len(blocks) - 1, 1))
        ends = i in (0, len(blocks) - 1)
        label = block["name"] if ends else None
        axes.plot([e / errors[0] for e in errors], color=color, linewidth=1, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _describe_lines(axes, "epochs", "held-out error, relative", legend=True)
    return figure


def _describe_lines(axes: Any, horizontal: str, vertical: str, *, legend: bool) -> None:
    """Label axes with lines, which start at 0, and add a legend if requested."""
    axes.set_xlabel(horizontal, fontsize=8)
    axes.set_ylabel(vertical, fontsize=8)
    axes.set_ylim(bottom=0)
    if legend:
        axes.legend(frameon=False, labelcolor=GRAY, fontsize=8)


def _heat_map(experts: Mapping[str, Sequence[int]]) -> Figure:
    """Show the tokens of every expert: a row for each parameter that holds experts."""
    width = max(len(counts) for counts in experts.values())
    rows = [[*counts, *[float("nan")] * (width - len(counts))] for counts in experts.values()]
    figure = _figure((8, 0.9 + 0.22 * len(rows)))
    axes = _axes(figure)
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [".".join(name.split(".")[-5:]) for name in experts])
    axes.tick_params(axis="y", labelsize=6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("expert", fontsize=8)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(colors=GRAY, labelsize=7)
    bar.set_label("calibration tokens", color=GRAY, fontsize=8)
    return figure


def _bar_chart(times: Mapping[str, float]) -> Figure:
    figure = _figure((8, 0.5 + 0.32 * len(times)))
    axes = _axes(figure)
    names = list(times)[::-1]
    bars = axes.barh(names, [times[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.1f s", color=GRAY, fontsize=8, padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds", fontsize=8)
    return figure


def _grid(names: Sequence[str], draw: Callable[[Any, str], None]) -> Figure:
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure((8, 2.4 * rows))
    for i, name in enumerate(names):
        axes = _axes(figure, rows, columns, i + 1)
        axes.set_title(".".join(name.split(".")[-4:]), fontsize=7)
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
    axes.set_xlabel("log₁₀ score", fontsize=7)
    axes.legend(frameon=False, labelcolor=GRAY, fontsize=6)


def _draw_mask(axes: Any, mask: Tensor) -> None:
    shades = torch.where(mask[:CROP, :CROP].cpu(), 1.0, 0.25)
    axes.imshow(shades.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
