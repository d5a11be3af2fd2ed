"""Method, results and recommendations of a run as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from symprune_lightning.checkpoints.card import ONE_SOURCE, is_one_source, shown_settings
from symprune_lightning.data.texts import SELF
from symprune_lightning.engine.result import describe_sparse_start

PERPLEXITY = "val_perplexity"

METHOD = (
    *("score", "sparsity", "pattern", "group", "refine", "update", "solver", "allocation"),
    "reconstruct",
)
"""Settings that the first sentence names."""

LOW_COVERAGE = 0.9
"""Fraction of the blocks' weights in pruned layers below which the report says so."""

GOOD, POOR = 1.1, 1.5
"""Pruned by dense perplexity up to which nothing has to be done, and from which much is lost."""


def asked(manifest: Mapping[str, Any]) -> str:
    """Return method and calibration data in one sentence.

    Examples:
        >>> asked({"settings": {"score": "RIA", "sparsity": 0.5, "refine": None}, "data": None})
        'score RIA, sparsity 0.5'
    """
    method, data = shown_settings(manifest)
    parts = [f"{name} {method[name]}" for name in METHOD if name in method]
    if manifest.get("distillation"):
        parts.append(f"distillation {manifest['distillation'].get('steps', '')} steps".strip())
    if data:
        parts.append(f"calibrated on {_source(manifest, data)}" + _size(data))
    return ", ".join(parts)


def _source(manifest: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    dataset = manifest["data"].get("dataset")
    if isinstance(dataset, Mapping) and "iterable" in dataset:
        return "texts in memory"
    if isinstance(dataset, Mapping) and SELF in dataset:
        return "samples of the model"
    if isinstance(dataset, Mapping) and "path" in dataset:
        column = dataset.get("column") or "text"
        return str(dataset["path"]) + f" (column {column})" * (column != "text")
    return str(data.get("dataset", "batches"))


def _size(data: Mapping[str, Any]) -> str:
    if "sequences" not in data or "sequence_length" not in data:
        return ""
    return f" ({data['sequences']} × {data['sequence_length']} tokens)"


def outcome(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each evaluated set of texts, or one that nothing was evaluated.

    Examples:
        >>> metrics = {"dense": {"val_perplexity": 10.0}, "pruned": {"val_perplexity": 12.0}}
        >>> list(outcome({"metrics": metrics}))
        ['val_perplexity: 1.20 × that of the dense model (10.00 → 12.00)']
    """
    ratios = ratios_of(manifest)
    for name, (dense, pruned) in ratios.items():
        ratio = pruned / dense
        yield f"{name}: {ratio:.2f} × that of the dense model ({dense:.2f} → {pruned:.2f})"
    if not ratios:
        yield "The perplexity of the dense or the pruned model was not measured."
    before, after = manifest.get("initial_sparsity") or 0.0, manifest.get("sparsity") or 0.0
    if sentence := describe_sparse_start(before, after):
        yield sentence


def ratios_of(manifest: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return dense and pruned perplexity by metric; of each set of texts if there are several."""
    found = perplexities(manifest)
    return {name: pair for name, pair in found.items() if "/" in name} or found


def perplexities(manifest: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return dense and pruned perplexity by metric: of all texts, and of each set."""
    metrics = manifest.get("metrics") or {}
    dense, pruned = metrics.get("dense") or {}, metrics.get("pruned") or {}
    names = [name for name in pruned if name.startswith(PERPLEXITY) and name in dense]
    return {name: (dense[name], pruned[name]) for name in names}


def advice(manifest: Mapping[str, Any]) -> list[str]:
    """Return what to try next, most effective first; empty if nothing has to be done."""
    return [*_about_quality(manifest), *_about_evidence(manifest)]


def _about_quality(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what lowers the perplexity of the pruned model."""
    ratios = [pruned / dense for dense, pruned in ratios_of(manifest).values()]
    if not ratios or max(ratios) <= GOOD:
        return
    if len(ratios) > 1 and max(ratios) > 1.3 * min(ratios):
        yield (
            "The model loses more on one kind of text than on another: calibrate on texts like "
            "those that it is for, or on both kinds."
        )
    settings = manifest.get("settings") or {}
    if not settings.get("refine") and not settings.get("solver"):
        yield "ExactSwap (refine: exactswap) improves the mask; kept weights do not change."
    if not settings.get("update") and not settings.get("solver"):
        yield "MaskedCG (update: maskedcg) fits the kept weights to the mask."
    # neither N:M nor groups of several layers nor a sparsity by layer leave a choice
    can_allocate = isinstance(settings.get("sparsity", 0.5), float) and not settings.get("pattern")
    can_allocate &= settings.get("group") not in ("block", "model")
    if can_allocate and not settings.get("allocation"):
        yield "Sensitivity (allocation: sensitivity) prunes less where the loss is sensitive."
    if not manifest.get("blocks") and max(ratios) > POOR:
        yield (
            "Reconstruction (reconstruct: true, calibration_order: block) trains the kept weights "
            "of each block."
        )
    if not manifest.get("distillation") and max(ratios) > POOR:
        yield "Distillation, or fine-tuning with MaskedFinetuning, recovers further quality."


def _about_evidence(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the figures do not show."""
    if is_one_source(manifest):
        yield ONE_SOURCE
    coverage = manifest.get("coverage") or {}
    if coverage.get("fraction", 1.0) < LOW_COVERAGE:
        yield (
            f"Only {100 * coverage['fraction']:.0f} % of the weights of the blocks are in pruned "
            f"layers: see Left dense."
        )
    layers = manifest.get("layers") or []
    few = [x["name"] for x in layers if x.get("tokens") and x["tokens"] < x["shape"][1]]
    if few:
        experts = ", or experts: all" if any("expert" in name for name in few) else ""
        yield (
            f"{len(few)} of {len(layers)} layers were measured on fewer tokens than they have "
            f"inputs, such as {few[0]}: use more calibration sequences{experts}."
        )
