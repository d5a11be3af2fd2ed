"""Pruned checkpoints and their manifest: written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.engine.result import PruneResult
from symprune_lightning.files import whole_folder

MANIFEST = "sparsity_manifest.json"


def check_destination(output: str | Path) -> Path:
    """Make sure that a checkpoint can be written, before hours are spent on it.

    Args:
        output: The folder to be written.

    Returns:
        Its absolute path.

    Raises:
        FileExistsError: It holds files that are no earlier checkpoint of ours.
        PermissionError: Its parent folder can't be written to, or it is a mount point.
        NotADirectoryError: A part of the path is a file.
    """
    path = Path(output).expanduser().absolute()
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"cannot write a checkpoint to {path}: {part} is a file")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise FileExistsError(
            f"{path} holds files, and no {MANIFEST} says that they are an earlier pruned "
            f"checkpoint: choose a new folder"
        )
    if os.path.ismount(path):
        raise PermissionError(
            f"{path} is a mount point, which can't be replaced as a whole: choose a folder in it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {path.parent}: {error}; choose another") from error
    return path


def save_checkpoint(
    output: str | Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    manifest: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a pruned model as plain safetensors with zeros in place, and its manifest.

    Everything goes into a folder with a temporary name, is flushed to disk, and takes its name in
    one step. An earlier checkpoint of ours at that place is replaced only then.

    Args:
        output: The folder.
        model: The pruned model.
        tokenizer: Saved along, if there is one.
        manifest: Contents of ``sparsity_manifest.json``, see ``manifest_of``.
        state: The weights, if this process does not hold all of the model's.

    Returns:
        The folder's absolute path.

    Raises:
        OSError: See ``check_destination``; or the disk is full, and nothing has changed.
    """
    path = check_destination(output)
    with whole_folder(path) as partial:
        model.save_pretrained(partial, state_dict=None if state is None else dict(state))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_manifest(partial, manifest)
    return path


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``sparsity_manifest.json``."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def manifest_of(
    result: PruneResult,
    *,
    model: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    dense: Mapping[str, float],
    pruned: Mapping[str, float],
) -> dict[str, Any]:
    """What was done to which model with which data, and what came of it, in plain values.

    Args:
        result: Masks and reports.
        model: Name or path of the dense model.
        settings: The method.
        data: Where the tokens came from, and their hashes.
        dense: Metrics of the dense model.
        pruned: Metrics of the pruned model.
    """
    packages = ("symprune-lightning", "torch", "transformers", "lightning", "torchmetrics")
    return {
        "model": model,
        "settings": dict(settings),
        "data": None if data is None else dict(data),
        "sparsity": result.sparsity,
        "metrics": {"dense": dict(dense), "pruned": dict(pruned)},
        "layers": [asdict(report) for report in result.layers],
        "trials": [{"allocation": repr(t.allocation), "error": t.error} for t in result.trials],
        "unreached_layers": list(result.unreached),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
