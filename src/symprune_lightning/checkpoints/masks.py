"""Saving and loading of bit-packed masks, and inference of masks from zeros."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from symprune_lightning.engine.files import atomic_file
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.exempt import exempt_layers
from symprune_lightning.engine.layers.find import all_layers
from symprune_lightning.engine.layers.match import match_layers
from symprune_lightning.engine.layers.select import FLOATING_DTYPES, prunable_layers
from symprune_lightning.errors import PruningWarning, first_of
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
    adapter) are not either: they have no mask. Heads, routers and output projections, which are
    pruned only by name, have one if most of their rows have zeros: single rows of zeros are those
    of unused tokens.

    Args:
        model: A pruned model.

    Returns:
        Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        ValueError: A layer with zeros is quantised, or computes its weight.
    """
    masks, all_zero = PackedMasks(), list[str]()
    layers = all_layers(model)
    exempt = exempt_layers(model, layers)
    dense = [x.name for x in layers if _is_certainly_dense(x, x.name in exempt)]
    for layer in prunable_layers(model, ignore=dense, with_exempt=True):
        zeros = _zeros(layer)
        is_pruned = _is_pruned_by_name(zeros) if layer.name in exempt else zeros.any()
        if is_pruned and not zeros.all():
            masks.add(layer.name, ~zeros)
        elif zeros.all() and layer.name not in exempt:
            all_zero.append(layer.name)
    if all_zero:
        warnings.warn(
            f"{first_of(all_zero)}: all zero, so without a mask, since they may be new: if they "
            f"were pruned, use the masks of the result in place of those that are inferred",
            PruningWarning,
            stacklevel=2,
        )
    return masks


def _is_certainly_dense(layer: Layer, is_exempt: bool) -> bool:
    """Return whether a layer has no mask, although it may be of a kind that cannot be pruned."""
    if is_exempt and (layer.parameter.is_meta or layer.parameter.dtype not in FLOATING_DTYPES):
        return True
    # zeros in a weight that is computed, as by torch.nn.utils.prune, are refused later
    return layer.is_computed and not bool(_zeros(layer).any())


def _is_pruned_by_name(zeros: Tensor) -> bool:
    """Return whether most rows have zeros, beside rows and columns that are all zero."""
    scattered = zeros & ~zeros.all(0) & ~zeros.all(1, keepdim=True)
    return bool(scattered.any(1).float().mean() > 0.5)


def _zeros(layer: Layer) -> Tensor:
    return layer.matrix() == 0


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the pruned weights of a model.

    Args:
        model: The model that the masks were made for, dense or not.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        ValueError: The masks belong to another model, or are not bool; nothing has changed.
    """
    for layer in match_layers(model, masks):
        layer.mask_(masks[layer.name].to(layer.parameter.device))
