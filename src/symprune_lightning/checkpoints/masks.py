"""Saving and loading of bit-packed masks, and inference of masks from zeros."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from symprune_lightning.engine.files import atomic_file
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.find import find_layers
from symprune_lightning.engine.layers.select import prunable_layers
from symprune_lightning.functional.packing import PackedMasks

FOLDER = "symprune"
"""Sub-folder of the masks in a checkpoint: inference servers load every ``*.safetensors`` of the
top folder as weights."""

FILE = "masks.safetensors"


def save_masks(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks to a safetensors file, one bit per weight.

    Args:
        path: The file.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        OSError: The file cannot be written; an earlier one is unchanged.

    Examples:
        >>> import tempfile, torch
        >>> path = f"{tempfile.mkdtemp()}/masks.safetensors"
        >>> save_masks(path, {"0": torch.tensor([[True, False]])})
        >>> load_masks(path)["0"]
        tensor([[ True, False]])
    """
    path = Path(path)
    packed_masks = masks if isinstance(masks, PackedMasks) else PackedMasks(masks)
    packed = {name: packed_masks.packed(name) for name in packed_masks}
    columns = {name: count for name, (_, count) in packed.items()}
    metadata = {"columns": json.dumps(columns)}  # the order of several keys would be random
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as tmp:
            save_file({name: bits for name, (bits, _) in packed.items()}, tmp, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_masks(path: str | Path) -> PackedMasks:
    """Load masks from a file, or from a checkpoint that was written with them.

    Args:
        path: The file, or the checkpoint's folder.

    Returns:
        Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        FileNotFoundError: There are no masks at this path.
        ValueError: The file holds no masks, or cannot be read.
    """
    path = Path(path).expanduser()
    files = mask_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"no masks at {path}: pass a {FILE}, or the folder of a checkpoint written with masks"
        )
    masks = PackedMasks()
    for file in files:
        for name, bits, columns in _read_packed(file):
            masks.add_packed(name, bits, columns)
    return masks


def mask_files(folder: Path) -> list[Path]:
    """Return the mask files of a checkpoint; a streamed one has a file for each block."""
    return sorted((folder / FOLDER).glob("masks*.safetensors"))


def _read_packed(file: Path) -> Iterator[tuple[str, Tensor, int]]:
    try:
        with safe_open(file, framework="pt") as opened:
            columns = json.loads((opened.metadata() or {})["columns"])
            for name in columns:
                yield name, opened.get_tensor(name), columns[name]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} holds no masks that can be read: {error}") from error


def hash_masks(masks: PackedMasks) -> str:
    """Return a hash of masks and layer names."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        bits, columns = masks.packed(name)
        digest.update(f"{name} {tuple(bits.shape)} {columns}".encode() + bits.numpy().tobytes())
    return digest.hexdigest()


def infer_masks(model: nn.Module) -> PackedMasks:
    """Infer the masks of the layers that have zeros.

    Layers without any zero are not pruned, and layers that are all zero (a freshly initialised
    adapter) are not either: they have no mask.

    Args:
        model: A pruned model.

    Returns:
        Layer name to bool mask ``(out_features, in_features)``, True = kept.
    """
    masks = PackedMasks()
    for layer in prunable_layers(model):
        mask = layer.matrix() != 0
        if mask.any() and not mask.all():
            masks.add(layer.name, mask)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the pruned weights of a model.

    Args:
        model: The model that the masks were made for, dense or not.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        ValueError: The masks belong to another model; nothing has changed.
    """
    for layer in match_layers(model, masks):
        layer.mask_(masks[layer.name].to(layer.parameter.device))


def match_layers(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Layer]:
    """Return the layers that masks belong to, in the order of the masks.

    Raises:
        ValueError: The model has no such layer, or one of another shape.
    """
    try:
        layers = find_layers(model, masks)
    except KeyError as error:
        name, kind = error.args[0], type(model).__name__
        prefixed = [n for n, _ in model.named_modules() if n.endswith(f".{name}")]
        advice = "do the masks belong to another model?"
        if prefixed:
            part = prefixed[0].removesuffix(f".{name}")
            advice = (
                f"it has a layer {prefixed[0]}. If the masks belong to its part {part!r}, pass "
                f"that module; in a LightningModule, set the attribute prunable_model to it"
            )
        raise ValueError(
            f"there is a mask for layer {name}, which {kind} does not have: {advice}"
        ) from None
    for layer in layers:
        shape, mask_shape = tuple(layer.shape), _shape(masks, layer.name)
        if shape != mask_shape:
            raise ValueError(
                f"the mask of layer {layer.name} is {mask_shape}, its weight {shape}: do the "
                f"masks belong to another model?"
            )
    return layers


def _shape(masks: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if isinstance(masks, PackedMasks):  # without unpacking
        bits, columns = masks.packed(name)
        return len(bits), columns
    return tuple(masks[name].shape)
