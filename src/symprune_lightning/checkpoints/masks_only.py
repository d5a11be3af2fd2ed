"""Copies of checkpoints without weights: masks, and the name of the model that they apply to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.checkpoints.masks import apply_masks, load_masks
from symprune_lightning.checkpoints.packed import (
    FORMAT_VERSION,
    copy_others,
    read_info,
    sha256,
    source_and_destination,
)
from symprune_lightning.checkpoints.pretrained import load_model, local_folder
from symprune_lightning.checkpoints.weight_files import INFO, read_tensors, weight_files
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
    so that a copy which does not restore every weight is not written. The dense model is loaded
    into memory.

    Args:
        folder: A checkpoint of this package whose kept weights are those of the dense model.
        output: Folder to write.
        base: The dense model, as in ``CausalLMModule``. Default: ``None``, the model that the
            manifest names.
        trust_remote_code: Allow custom code from the dense model. Default: ``False``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``folder`` has no weights in safetensors, or no masks.
        ValueError: The kept weights are not those of ``base``, or the manifest names no model.
        OSError: ``output`` cannot be written, has other files, or is ``folder``; or ``base`` cannot
            be loaded.
    """
    source, path = source_and_destination(folder, output, packs=True)
    files = weight_files(source)
    load_masks(source)  # raises if there are none
    changed = changes_of_weights(source)
    if changed:
        raise ValueError(
            f"{changed} changed the kept weights of {source}, so masks cannot restore it: use "
            f"`symprune pack` without --masks_only"
        )
    model = _base_of(source, base)
    tensors = {
        name: {"file": files[name], "dtype": _dtype_name(tensor.dtype), "sha256": sha256(tensor)}
        for name, tensor in read_tensors(source, files, files)
    }
    info: dict[str, Any] = {"format_version": FORMAT_VERSION, "tensors": tensors}
    with atomic_directory(path) as tmp:
        copy_others(source, tmp, set(files.values()))
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as trial:
            advice = (
                "if the weights were updated or trained after masking, masks cannot restore them: "
                "use `symprune pack` without --masks_only"
            )
            _write_weights(tmp, Path(trial), tensors, model, advice, trust_remote_code)
        info["base"] = {"model": model, "revision": _revision(model)}
        write_json(tmp / INFO, info)
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
        trust_remote_code: Allow custom code from ``base``, which has to be passed: the name in a
            copy is not to be trusted. Default: ``False``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``folder`` is no copy of ``pack_masks``.
        ValueError: The masks are damaged, ``base`` is not the model that was pruned, or
            ``trust_remote_code`` is passed without ``base``.
        OSError: ``output`` cannot be written, or has other files; or ``base`` cannot be loaded.
    """
    source, path = source_and_destination(folder, output, packs=False)
    info = read_info(source)
    pointer = info.get("base")
    if pointer is None:
        raise ValueError(f"{source} has weights: restore it by `symprune unpack {folder} {output}`")
    if trust_remote_code and base is None:
        raise ValueError(
            f"trust_remote_code would run code of {pointer['model']}, which {source / INFO} names: "
            f"pass the model that you trust (--model)"
        )
    commit = f" It was commit {pointer['revision']}." if pointer.get("revision") else ""
    advice = (
        f"either the masks are damaged, or this is another model or version than the one that was "
        f"pruned: pass that one (--model).{commit}"
    )
    with atomic_directory(path) as tmp:
        copy_others(source, tmp, {INFO})
        model = base or pointer["model"]
        _write_weights(source, tmp, info["tensors"], model, advice, trust_remote_code)
    return path


def changes_of_weights(folder: Path) -> str:
    """Return what changed the kept weights of a checkpoint by its manifest; empty for nothing."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return ""
    settings = manifest.get("settings") or {}
    methods = [settings.get("update"), settings.get("solver")]
    names = [method["name"] for method in methods if isinstance(method, Mapping)]
    names += ["reconstruct"] * bool(manifest.get("blocks"))
    names += ["Distillation"] * bool(manifest.get("distillation"))
    return ", ".join(names)


def _base_of(source: Path, base: str | None) -> str:
    """Return the name of the dense model of a checkpoint."""
    try:
        model = base or str(read_manifest(source)["model"])
    except OSError as error:
        raise ValueError(f"{source} has no manifest that names a model: pass --base") from error
    if not model:
        raise ValueError(f"the manifest of {source} names no model: pass --base")
    folder = local_folder(model)
    if folder is not None and folder.resolve() == source:
        raise ValueError(f"{model} is the pruned checkpoint itself: pass the dense model (--base)")
    return model


def _revision(model: str) -> str | None:
    """Return the commit of a hub model in the cache; ``None`` for other models."""
    folder = local_folder(model)
    is_cached = folder is not None and folder.parent.name == "snapshots"
    return folder.name if folder is not None and is_cached else None


def _write_weights(
    source: Path,
    target: Path,
    tensors: Mapping[str, Mapping[str, str]],
    model: str,
    advice: str,
    trust_remote_code: bool,
) -> None:
    """Write the weights of the dense model with masks applied, after comparing their hashes."""
    # the widest dtype of the files: narrower tensors are cast from it without another rounding
    dtypes = (getattr(torch, entry["dtype"]) for entry in tensors.values())
    widest = max((x for x in dtypes if x.is_floating_point), key=lambda x: x.itemsize)
    try:
        dense = load_model(model, dtype=_dtype_name(widest), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise OSError(
            f"the dense model cannot be loaded; pass it (pack: --base, apply: --model): {error}"
        ) from error
    apply_masks(dense, load_masks(source))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        written = Path(folder)
        dense.save_pretrained(written)
        del dense
        files = weight_files(written)
        for file in sorted({entry["file"] for entry in tensors.values()}):
            expected = {name: x for name, x in tensors.items() if x["file"] == file}
            restored = dict(_restored(written, files, expected, model, advice))
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(restored, target / file, metadata={"format": "pt"})


def _restored(
    written: Path,
    files: Mapping[str, str],
    expected: Mapping[str, Mapping[str, str]],
    model: str,
    advice: str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file of the checkpoint in their dtypes."""
    missing = [name for name in expected if name not in files]
    if missing:
        raise ValueError(
            f"{model} is saved without a tensor {missing[0]}, which the checkpoint has: {advice}"
        )
    for name, tensor in read_tensors(written, files, expected):
        restored = tensor.to(getattr(torch, expected[name]["dtype"]))
        if sha256(restored) != expected[name]["sha256"]:
            raise ValueError(
                f"{name} of {model}, with the masks applied, is not that of the pruned "
                f"checkpoint: {advice}"
            )
        yield name, restored


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
