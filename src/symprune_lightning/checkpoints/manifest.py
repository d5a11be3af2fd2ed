"""The manifest of a pruned checkpoint: model, data, method, figures and versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from symprune_lightning.checkpoints.card import model_card
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.engine.result import PruneResult

MANIFEST = "sparsity_manifest.json"

FORMAT_VERSION = 1
"""Raised whenever a key is renamed or removed."""


def build_manifest(
    result: PruneResult,
    *,
    model: str,
    architecture: str = "",
    settings: Mapping[str, Any],
    datamodule: CalibrationDataModule | None = None,
    distillation: Mapping[str, Any] | None = None,
    limit_val_batches: float | None = None,
    dense: Mapping[str, float] | None = None,
    pruned: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the manifest of a run as JSON values.

    Args:
        result: Masks and reports.
        model: Name or path of the dense model.
        architecture: Name of the model's class.
        settings: The method.
        datamodule: Source and hashes of the tokens.
        distillation: How the pruned model was trained, if it was.
        limit_val_batches: The Trainer's, if a part of the evaluation batches was run.
        dense: Metrics of the dense model.
        pruned: Metrics of the pruned model.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": model,
        "architecture": architecture,
        "settings": dict(settings),
        "data": None if datamodule is None else datamodule.settings,
        "distillation": None if distillation is None else dict(distillation),
        "limit_val_batches": limit_val_batches,
        "sparsity": result.sparsity,
        "initial_sparsity": result.initial_sparsity,
        "metrics": {"dense": dict(dense or {}), "pruned": dict(pruned or {})},
        "layers": [asdict(report) for report in result.layers],
        "blocks": [asdict(report) for report in result.blocks],
        "trials": [{"allocation": repr(t.allocation), "error": t.error} for t in result.trials],
        "coverage": {
            "fraction": result.coverage,
            "left_dense": [asdict(weight) for weight in result.left_dense],
        },
        "unreached_layers": list(result.unreached),
        "layers_pruned_by_magnitude": list(result.pruned_by_magnitude),
        "versions": _versions(),
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``sparsity_manifest.json`` and the model card ``README.md`` into a folder."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        OSError: There is none.
        ValueError: It is not a manifest, or one of another format version.
    """
    path = folder / MANIFEST
    text = path.read_text("utf-8")
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a manifest of symprune-lightning")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest.get('format_version')}, this version of "
            f"symprune-lightning reads version {FORMAT_VERSION}: use the version that wrote it "
            f"({manifest.get('versions', {}).get('symprune-lightning', 'unknown')})"
        )
    if not manifest.get("layers"):
        raise ValueError(f"{path} lists no layers")
    return manifest


def _versions() -> dict[str, str]:
    packages = ("symprune-lightning", "torch", "transformers", "lightning", "torchmetrics")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
