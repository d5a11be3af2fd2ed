"""Packed copies of checkpoints: the weights that are not zero, and one bit for each weight."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from symprune_lightning.checkpoints.export import check_destination
from symprune_lightning.checkpoints.manifest import MANIFEST
from symprune_lightning.checkpoints.masks import FILE, FOLDER, load_masks, save_masks
from symprune_lightning.checkpoints.weight_files import (
    INFO,
    check_inside,
    open_weights,
    read_tensors,
    weight_files,
)
from symprune_lightning.engine.files import atomic_directory, write_json
from symprune_lightning.functional.packing import pack, unpack

FORMAT_VERSION = 1
VALUES, MASK = "::values", "::mask"
"""Suffixes of the two parts of a packed tensor."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_checkpoint(folder: str | Path, output: str | Path) -> Path:
    """Write a packed copy of a checkpoint, from which ``unpack_checkpoint`` restores every bit.

    Of a tensor with many zeros, the other values and one bit per weight are stored: about 56 % of
    a bfloat16 weight at a sparsity of 50 %. Other files are copied. Runtimes cannot load the copy.

    Args:
        folder: A checkpoint with weights in safetensors.
        output: Folder to write.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``folder`` has no weights in safetensors.
        OSError: ``output`` cannot be written, has other files, or is ``folder``.
    """
    source, path = source_and_destination(folder, output, packs=True)
    files = weight_files(source)
    names = _reproducible_masks(source, files)
    info: dict[str, Any] = {"format_version": FORMAT_VERSION, "masks": names, "tensors": {}}
    with atomic_directory(path) as tmp:
        copy_others(source, tmp, {*files.values(), *([f"{FOLDER}/{FILE}"] if names else [])})
        for file in sorted(set(files.values())):
            with open_weights(source / file) as opened:
                parts: dict[str, Tensor] = {}
                for name in opened.keys():  # noqa: SIM118 — no mapping
                    tensor = opened.get_tensor(name)
                    packed = _packed(tensor)
                    parts |= {name + suffix: part for suffix, part in packed.items()}
                    info["tensors"][name] = {
                        "file": file,
                        "shape": list(tensor.shape),
                        "is_packed": VALUES in packed,
                        "sha256": sha256(tensor),
                    }
                metadata = opened.metadata()
            (tmp / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(parts, tmp / file, metadata=metadata)
        write_json(tmp / INFO, info)
    return path


def unpack_checkpoint(folder: str | Path, output: str | Path) -> Path:
    """Restore a checkpoint from its packed copy, and verify the hash of every tensor.

    Args:
        folder: The packed copy.
        output: Folder to write.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: ``folder`` is no packed copy.
        ValueError: The copy is damaged, or of another version.
        OSError: ``output`` cannot be written, or has other files.
    """
    source, path = source_and_destination(folder, output, packs=False)
    info = read_info(source)
    if info.get("base") is not None:
        raise ValueError(
            f"{source} has the masks of {info['base']['model']} only: restore the checkpoint by "
            f"`symprune apply --masks {folder} --output {output}`"
        )
    tensors: Mapping[str, Any] = info["tensors"]
    files = {name: entry["file"] for name, entry in tensors.items()}
    with atomic_directory(path) as tmp:
        copy_others(source, tmp, {INFO, *files.values()})
        for file in sorted(set(files.values())):
            members = {name: entry for name, entry in tensors.items() if entry["file"] == file}
            restored, metadata = _restored(source / file, members)
            (tmp / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(restored, tmp / file, metadata=metadata)
        if info["masks"]:
            weights = read_tensors(tmp, files, [f"{name}.weight" for name in info["masks"]])
            masks = {name.removesuffix(".weight"): weight != 0 for name, weight in weights}
            save_masks(tmp / FOLDER / FILE, {name: masks[name] for name in info["masks"]})
    return path


def source_and_destination(
    folder: str | Path, output: str | Path, *, packs: bool
) -> tuple[Path, Path]:
    """Return the absolute paths of a copy's source and destination, which can be written.

    Args:
        folder: The source.
        output: The destination. Replaced are a packed copy by another one, and a checkpoint by one
            with the same manifest.
        packs: Whether the source is a checkpoint, and the destination a packed copy.

    Raises:
        OSError: See ``check_destination``; or they are the same folder, or the destination is
            another checkpoint.
    """
    source = Path(folder).expanduser().resolve()
    path = check_destination(output)
    if source == path:
        raise FileExistsError(f"{path} would replace itself: write to another folder")
    before, after = path / MANIFEST, source / MANIFEST
    is_same = before.is_file() and after.is_file() and before.read_bytes() == after.read_bytes()
    is_replaced = (path / INFO).is_file() if packs else is_same and not (path / INFO).is_file()
    if path.is_dir() and any(path.iterdir()) and not is_replaced:
        raise FileExistsError(f"{path} holds another checkpoint: choose a new folder")
    return source, path


def folder_size(folder: str | Path) -> int:
    """Return the size of all files of a folder in bytes."""
    files = Path(folder).expanduser().rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def read_info(source: Path) -> dict[str, Any]:
    """Read ``packed.json``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another version.
    """
    if not (source / INFO).is_file():
        raise FileNotFoundError(f"{source} has no {INFO}: pass a folder of `symprune pack`")
    try:
        info: dict[str, Any] = json.loads((source / INFO).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source / INFO} is damaged: {error}") from error
    if not isinstance(info, dict) or not isinstance(info.get("tensors"), dict):
        raise ValueError(f"{source / INFO} is damaged: it lists no tensors")
    if info.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{source} has packed format {info.get('format_version')}, and this version reads "
            f"format {FORMAT_VERSION}: unpack it with the version that wrote it"
        )
    try:
        check_inside({name: entry["file"] for name, entry in info["tensors"].items()})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source / INFO} is damaged: {error}") from error
    if info.get("base") is not None and "model" not in info["base"]:
        raise ValueError(f"{source / INFO} is damaged: it names no model")
    return info


def packed_size(tensor: Tensor) -> int:
    """Return the bytes of a tensor in a packed copy, without names."""
    return min(_parts_size(tensor, _bits(tensor) != 0), tensor.nbytes)


def _packed(tensor: Tensor) -> dict[str, Tensor]:
    """Return the parts of a tensor by suffix; the tensor itself where that takes less space."""
    bits = _bits(tensor)
    kept = bits != 0  # of the bits, so that negative zeros are restored
    if _parts_size(tensor, kept) >= tensor.nbytes:
        return {"": tensor}
    return {VALUES: tensor.flatten()[kept], MASK: pack(kept[None])[0]}


def _parts_size(tensor: Tensor, kept: Tensor) -> int:
    """Return the bytes of the kept values and of the mask of a tensor."""
    return int(kept.sum()) * tensor.element_size() + -(-tensor.numel() // 8)


def _restored(
    file: Path, members: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors of a file of a packed copy, and the metadata of the file."""
    restored: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name, entry in members.items():
                if entry["is_packed"]:
                    values, mask = (opened.get_tensor(name + part) for part in (VALUES, MASK))
                    restored[name] = _unpacked(values, mask, entry["shape"])
                else:
                    restored[name] = opened.get_tensor(name)
                if sha256(restored[name]) != entry["sha256"]:
                    raise ValueError(f"{name} differs from the checkpoint that was packed")
            return restored, opened.metadata()
    except (SafetensorError, RuntimeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"the packed copy {file} is damaged: {error}") from error


def _unpacked(values: Tensor, mask: Tensor, shape: list[int]) -> Tensor:
    flat = torch.zeros(torch.Size(shape).numel(), dtype=values.dtype)
    kept = unpack(mask[None], flat.numel())[0]
    if int(kept.sum()) != values.numel():
        raise ValueError(f"it has {values.numel()} values for {int(kept.sum())} positions")
    _bits(flat)[kept] = _bits(values)
    return flat.view(shape)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, flat; a view if the tensor is contiguous."""
    return tensor.flatten().view(INTEGERS[tensor.element_size()])


def sha256(tensor: Tensor) -> str:
    """Return a hash of dtype, shape and bits of a tensor."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _reproducible_masks(source: Path, files: Mapping[str, str]) -> list[str]:
    """Return the names of the stored masks if the zeros of the weights tell all of them."""
    if not (source / FOLDER / FILE).is_file():
        return []
    masks = load_masks(source)
    names = {f"{name}.weight": name for name in masks}
    if not names.keys() <= files.keys():
        return []
    for weight_name, weight in read_tensors(source, files, names):
        mask = masks[names[weight_name]]
        if weight.shape != mask.shape or not torch.equal(weight != 0, mask):
            return []
    return list(masks)


def copy_others(source: Path, target: Path, left_out: set[str]) -> None:
    """Copy all files of a folder except some."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if file.is_file() and name.as_posix() not in left_out:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
