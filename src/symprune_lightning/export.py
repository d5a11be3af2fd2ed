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

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.card import model_card, source_folder
from symprune_lightning.engine.parallel import Ranks, whole_state
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.files import whole_folder
from symprune_lightning.masks import FILE, FOLDER, masks_of_zeros, save_masks

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
    masks: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a pruned model as plain safetensors with zeros in place, its masks and its manifest.

    Everything goes into a folder with a temporary name, is flushed to disk, and takes its name in
    one step. An earlier checkpoint of ours at that place is replaced only then. Files are no larger
    than those of the checkpoint that the model came from.

    Args:
        output: The folder.
        model: The pruned model.
        tokenizer: Saved along, if there is one.
        manifest: Contents of ``sparsity_manifest.json``, see ``manifest_of``.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.
        state: The weights, if this process does not hold all of the model's.

    Returns:
        The folder's absolute path.

    Raises:
        OSError: See ``check_destination``; or the disk is full, and nothing has changed.
    """
    path = check_destination(output)
    largest = _largest_file(str(manifest.get("model", "")))
    with whole_folder(path) as partial:
        try:
            model.save_pretrained(
                partial,
                state_dict=None if state is None else dict(state),
                max_shard_size="50GB" if largest is None else largest,
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            save_masks(partial / FOLDER / FILE, masks)
            write_description(partial, manifest)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"cannot write the checkpoint {path}: {error}. Nothing there has changed"
            ) from error
    return path


def export_model(
    model: PreTrainedModel,
    output: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write any model that has zeros, such as one that was fine-tuned after pruning.

    Masks and sparsity are those of its zeros. With several processes all must call this, and the
    first writes.

    Args:
        model: The model, sharded or not.
        output: The folder, see ``save_checkpoint``.
        tokenizer: Saved along, if there is one.
        settings: How it came about, in plain values, for the manifest and the model card.
        metrics: What was measured of it.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: No layer has zeros.
        OSError: See ``save_checkpoint``.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from symprune_lightning import prune_model
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> _ = prune_model(model, [torch.arange(32)[None]], score="wanda")
        >>> path = export_model(model, f"{tempfile.mkdtemp()}/pruned")
        >>> sorted(file.name for file in path.iterdir())[:3]
        ['README.md', 'config.json', 'generation_config.json']
    """
    masks = masks_of_zeros(model)
    if not masks:
        raise ValueError(f"no layer of {type(model).__name__} has zeros: prune it first")
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    manifest = {
        "model": str(model.config.name_or_path),
        "settings": dict(settings or {}),
        "data": None,
        "sparsity": sum(zeros.values()) / sum(mask.numel() for mask in masks.values()),
        "metrics": {"pruned": dict(metrics or {})},
        "layers": [
            {"name": n, "shape": list(mask.shape), "sparsity": zeros[n] / mask.numel()}
            for n, mask in masks.items()
        ],
        "versions": _versions(),
    }
    state, ranks = whole_state(model), Ranks.all()
    if ranks.rank == 0:
        save_checkpoint(output, model, tokenizer, manifest, masks, state)
    ranks.least(0)  # wait for it
    return Path(output).expanduser().absolute()


def write_description(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``sparsity_manifest.json``, and the model card ``README.md`` that tells it in words."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")


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
    return {
        "model": model,
        "settings": dict(settings),
        "data": None if data is None else dict(data),
        "sparsity": result.sparsity,
        "metrics": {"dense": dict(dense), "pruned": dict(pruned)},
        "layers": [asdict(report) for report in result.layers],
        "trials": [{"allocation": repr(t.allocation), "error": t.error} for t in result.trials],
        "unreached_layers": list(result.unreached),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("symprune-lightning", "torch", "transformers", "lightning", "torchmetrics")
    found = {name: version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def _largest_file(model: str) -> int | None:
    """Bytes of the largest weight file of the model's source, if that has several."""
    folder = source_folder(model)
    files = [] if folder is None else list(folder.glob("*.safetensors"))
    return max(file.stat().st_size for file in files) if len(files) > 1 else None
