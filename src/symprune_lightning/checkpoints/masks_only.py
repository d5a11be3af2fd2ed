"""Copies of checkpoints without weights: masks, and the name of the model that they apply to."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.checkpoints.masks import apply_masks, load_masks
from symprune_lightning.checkpoints.packed import (
    FORMAT_VERSION,
    INFO,
    copy_others,
    read_info,
    sha256,
    source_and_destination,
)
from symprune_lightning.checkpoints.pretrained import load_model, local_folder
from symprune_lightning.checkpoints.weight_files import read_tensors, weight_files
from symprune_lightning.engine.files import atomic_directory, write_json


def pack_masks(
    folder: str | Path,
    output: str | Path,
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Write a copy of a checkpoint that has masks in place of weights, one bit per weight.

    ``restore_from_masks`` makes the checkpoint from it and the dense model. That is done once here,
    so that a copy which does not restore every weight is not written.

    Args:
        folder: A checkpoint of this package whose kept weights are those of the dense model.
        output: Folder to write.
        base: The dense model, as in ``CausalLMModule``. Default: ``None``, the model that the
            manifest names.
        trust_remote_code: Allow custom code from the dense model. Default: ``False``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``folder`` has no weights in safetensors, no manifest or no masks.
        ValueError: The kept weights are not those of ``base``.
        OSError: ``output`` cannot be written, has other files, or is ``folder``.
    """
    source, path = source_and_destination(folder, output)
    files = weight_files(source)
    load_masks(source)  # raises if there are none
    info = {
        "format_version": FORMAT_VERSION,
        "base": _pointer(source, base),
        "tensors": {
            name: {"file": files[name], "sha256": sha256(tensor)}
            for name, tensor in read_tensors(source, files, files)
        },
    }
    with atomic_directory(path) as tmp:
        copy_others(source, tmp, set(files.values()))
        write_json(tmp / INFO, info)
        with tempfile.TemporaryDirectory(dir=path.parent) as trial:
            advice = (
                "if the weights were updated or trained after masking, masks cannot restore them: "
                "use `symprune pack` without --masks_only"
            )
            _write_weights(tmp, Path(trial), info, None, advice, trust_remote_code)
    return path


def restore_from_masks(
    folder: str | Path,
    output: str | Path,
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Make a checkpoint from its masks and the dense model, and verify the hash of every tensor.

    Args:
        folder: A copy written by ``pack_masks``.
        output: Folder to write.
        base: The dense model, as in ``CausalLMModule``. Default: ``None``, the model that the copy
            names.
        trust_remote_code: Allow custom code from the dense model. Default: ``False``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``folder`` is no copy of ``pack_masks``, or there is no such model.
        ValueError: The masks are damaged, or ``base`` is not the model that was pruned.
        OSError: ``output`` cannot be written, or has other files.
    """
    source, path = source_and_destination(folder, output)
    info = read_info(source)
    if info.get("base") is None:
        raise ValueError(f"{source} has weights: restore it by `symprune unpack {folder} {output}`")
    with atomic_directory(path) as tmp:
        copy_others(source, tmp, {INFO})
        advice = (
            "either the masks are damaged, or this is another model or version than the one that "
            "was pruned (--model)"
        )
        _write_weights(source, tmp, info, base, advice, trust_remote_code)
    return path


def _pointer(source: Path, base: str | None) -> dict[str, str | None]:
    """Return name, commit and dtype of the dense model of a checkpoint."""
    model = base or str(read_manifest(source)["model"])
    if not model:
        raise ValueError(f"the manifest of {source} names no model: pass base (--base)")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    folder = local_folder(model)
    is_cached = folder is not None and folder.parent.name == "snapshots"
    return {
        "model": model,
        "revision": folder.name if folder is not None and is_cached else None,
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }


def _write_weights(
    source: Path,
    target: Path,
    info: dict[str, Any],
    base: str | None,
    advice: str,
    trust_remote_code: bool,
) -> None:
    """Write the weights of the dense model with masks applied, and compare their hashes."""
    pointer = info["base"]
    name = base or pointer["model"]
    dense = load_model(name, dtype=pointer["dtype"], trust_remote_code=trust_remote_code)
    apply_masks(dense, load_masks(source))
    with tempfile.TemporaryDirectory(dir=target.parent) as written:
        dense.save_pretrained(written)
        files = weight_files(Path(written))
        for file in sorted({entry["file"] for entry in info["tensors"].values()}):
            tensors = {}
            for tensor_name, entry in info["tensors"].items():
                if entry["file"] != file:
                    continue
                tensor = _read(Path(written), files, tensor_name)
                if tensor is None or sha256(tensor) != entry["sha256"]:
                    raise ValueError(
                        f"{tensor_name} of {name}, with the masks applied, is not that of the "
                        f"pruned checkpoint: {advice}"
                    )
                tensors[tensor_name] = tensor
            save_file(tensors, target / file, metadata={"format": "pt"})


def _read(folder: Path, files: dict[str, str], name: str) -> Tensor | None:
    return dict(read_tensors(folder, files, [name]))[name] if name in files else None
