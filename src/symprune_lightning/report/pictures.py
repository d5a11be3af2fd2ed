"""The pictures of a report, on a transparent ground in greys and blues that suit light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

GREY, BLUE, ORANGE = "#888888", "#4a90d9", "#e08a3c"
BINS = 60
CROP = 96
"""Rows and columns of a mask that are shown."""

Reports = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Histogram:
    """How the scores of a layer are distributed.

    Attributes:
        low: Decimal logarithm of the least score shown.
        high: That of the greatest.
        kept: Share of weights in each bin that are kept.
        pruned: Share of weights in each bin that are pruned.
    """

    low: float
    high: float
    kept: list[float]
    pruned: list[float]


def histogram(scores: Tensor, mask: Tensor, sample: int = 50_000) -> Histogram | None:
    """Of a sample of scores; ``None`` if there is nothing to show."""
    stride = max(1, scores.numel() // sample)
    values, kept = scores.flatten()[::stride], mask.flatten()[::stride]
    shown = values.isfinite() & (values > 0)
    logs, kept = values[shown].double().log10(), kept[shown]
    if not len(logs):
        return None
    low, high = float(logs.quantile(0.005)), float(logs.max())
    if high - low < 1e-6:
        return None
    counts = [logs[kept].histc(BINS, low, high), logs[~kept].histc(BINS, low, high)]
    shares = [(count / len(logs)).tolist() for count in counts]
    return Histogram(low, high, *shares)


def pictures(
    layers: Reports,
    masks: Mapping[str, Tensor],
    histograms: Mapping[str, Histogram],
    times: Mapping[str, float],
) -> dict[str, Figure]:
    """All pictures that there is something to show in, by name.

    Args:
        layers: The manifest's reports, in the order of pruning.
        masks: Layer name to mask; may be empty.
        histograms: Layer name to histogram of its scores; may be empty.
        times: Where the time went, in seconds.
    """
    found = {"sparsity": _lines(layers, "zeros in a layer", [("sparsity", BLUE, "sparsity")])}
    errors = [("error", ORANGE, "by score"), ("error_refined", BLUE, "refined")]
    if any(layer.get("error_updated") is not None for layer in layers):
        errors.append(("error_updated", "#3c9a6a", "weights updated"))
    if any(layer.get("error") is not None for layer in layers):
        found["error"] = _lines(layers, "relative squared error of a layer's output", errors)
    if any(layer.get("swaps") for layer in layers):
        found["swaps"] = _lines(layers, "swaps by refining", [("swaps", BLUE, "swaps")])
    if times:
        found["time"] = _bars(times)
    chosen = chosen_layers([str(layer["name"]) for layer in layers])
    drawn = [name for name in chosen if name in histograms]
    if drawn:
        found["scores"] = _grid(drawn, lambda axes, name: _histogram(axes, histograms[name]))
    drawn = [name for name in chosen if name in masks]
    if drawn:
        found["masks"] = _grid(drawn, lambda axes, name: _mask(axes, masks[name]))
    return found


def chosen_layers(names: Sequence[str]) -> list[str]:
    """Six layers from the beginning, the middle and the end."""
    places = torch.linspace(0, len(names) - 1, min(6, len(names))).round().int().tolist()
    return list(dict.fromkeys(names[place] for place in places))


def png(figure: Figure) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True)
    return buffer.getvalue()


def _axes(figure: Figure, *place: int) -> Any:
    axes = figure.add_subplot(*(place or (1, 1, 1)))
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(GREY)
    return axes


def _lines(layers: Reports, title: str, what: Sequence[tuple[str, str, str]]) -> Figure:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = _axes(figure)
    for key, colour, label in what:
        values = [layer.get(key) for layer in layers]
        axes.plot([float("nan") if v is None else v for v in values], color=colour, label=label)
    axes.set_xlabel("layers, in the order of pruning", fontsize=8)
    axes.set_ylabel(title, fontsize=8)
    axes.set_ylim(bottom=0)
    if len(what) > 1:
        axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
    return figure


def _bars(times: Mapping[str, float]) -> Figure:
    figure = Figure(figsize=(8, 0.5 + 0.32 * len(times)), layout="constrained")
    axes = _axes(figure)
    names = list(times)[::-1]
    bars = axes.barh(names, [times[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.1f s", color=GREY, fontsize=8, padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds", fontsize=8)
    return figure


def _grid(names: Sequence[str], draw: Callable[[Any, str], None]) -> Figure:
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(8, 2.4 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = _axes(figure, rows, columns, i + 1)
        axes.set_title(".".join(name.split(".")[-4:]), fontsize=7)
        draw(axes, name)
    return figure


def _histogram(axes: Any, found: Histogram) -> None:
    width = (found.high - found.low) / BINS
    edges = [found.low + i * width for i in range(BINS)]
    axes.bar(edges, found.pruned, width, align="edge", color=ORANGE, label="pruned")
    axes.bar(edges, found.kept, width, align="edge", color=BLUE, label="kept", bottom=found.pruned)
    axes.set_yticks([])
    axes.set_xlabel("log₁₀ score", fontsize=7)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=6)


def _mask(axes: Any, mask: Tensor) -> None:
    shades = torch.where(mask[:CROP, :CROP].cpu(), 1.0, 0.25)
    axes.imshow(shades.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
