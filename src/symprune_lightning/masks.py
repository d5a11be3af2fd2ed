"""Masks as a file of bits, and masks that a model's zeros tell of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from symprune_lightning.engine.layers import Layer, prunable_layers
from symprune_lightning.files import whole_file
from symprune_lightning.functional.packing import pack, unpack

FOLDER = "symprune"
"""Where they are in a checkpoint: servers take all safetensors beside the weights for weights."""

FILE = "masks.safetensors"


def save_masks(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks, one bit for each weight.

    Args:
        path: The file.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        OSError: It can't be written; an earlier file is left as it was.

    Example:
        >>> import tempfile, torch
        >>> path = f"{tempfile.mkdtemp()}/masks.safetensors"
        >>> save_masks(path, {"0": torch.tensor([[True, False]])})
        >>> load_masks(path)
        {'0': tensor([[ True, False]])}
    """
    bits = {name: pack(mask).cpu() for name, mask in masks.items()}
    save_packed(path, bits, {name: mask.shape[1] for name, mask in masks.items()})


def save_packed(path: str | Path, bits: Mapping[str, Tensor], columns: Mapping[str, int]) -> None:
    """The same for masks that are packed already."""
    path = Path(path)
    metadata = {"format": "pt", "columns": json.dumps(dict(columns))}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as partial:
            save_file(dict(bits), partial, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read masks from a file, or from a checkpoint that was written with them.

    Args:
        path: The file, or the checkpoint's folder.

    Returns:
        Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It holds no masks, or can't be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / FOLDER / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no masks at {path}: give a {FILE}, or a folder that has one")
    try:
        with safe_open(path, framework="pt") as file:
            columns = json.loads((file.metadata() or {})["columns"])
            return {name: unpack(file.get_tensor(name), columns[name]) for name in columns}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no masks that can be read: {error}") from error


def masks_of_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of the layers that have zeros, by where these are.

    Layers without any zero are not pruned, and layers of nothing else (a fresh adapter) are not
    either: they have no mask.

    Args:
        model: A pruned model.

    Returns:
        Layer name to bool mask ``(out_features, in_features)``, True = kept.
    """
    masks = {layer.name: layer.read() != 0 for layer in prunable_layers(model)}
    return {name: m for name, m in masks.items() if m.any() and not m.all()}


def layers_of(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Layer]:
    """The layers that masks belong to.

    Raises:
        ValueError: The model has no such layer, or one of another shape.
    """
    layers = []
    for name, mask in masks.items():
        try:
            layer = Layer(name, model.get_submodule(name))
            shape = tuple(layer.shape)
        except AttributeError:
            raise ValueError(
                f"there is a mask for layer {name}, which {type(model).__name__} does not have: "
                f"are the masks another model's?"
            ) from None
        if shape != tuple(mask.shape):
            raise ValueError(
                f"the mask of layer {name} is {tuple(mask.shape)}, its weight {shape}: are the "
                f"masks another model's?"
            )
        layers.append(layer)
    return layers
