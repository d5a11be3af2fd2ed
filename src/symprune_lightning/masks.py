"""Masks as a file of bits, and masks that a model's zeros tell of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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

    Examples:
        >>> import tempfile, torch
        >>> path = f"{tempfile.mkdtemp()}/masks.safetensors"
        >>> save_masks(path, {"0": torch.tensor([[True, False]])})
        >>> load_masks(path)
        {'0': tensor([[ True, False]])}
    """
    path = Path(path)
    bits = {name: pack(mask).cpu() for name, mask in masks.items()}
    columns = {name: mask.shape[1] for name, mask in masks.items()}
    metadata = {"format": "pt", "columns": json.dumps(columns)}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as partial:
            save_file(bits, partial, metadata=metadata)
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
    return dict(stored_masks(path))


def stored_masks(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The same one by one, for models whose masks are large together."""
    path = Path(path).expanduser()
    files = sorted((path / FOLDER).glob("masks*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"no masks at {path}: give a {FILE}, or the folder of a checkpoint written with masks"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                columns = json.loads((opened.metadata() or {})["columns"])
                for name in columns:
                    yield name, unpack(opened.get_tensor(name), columns[name])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} holds no masks that can be read: {error}") from error


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


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the weights that masks say are pruned.

    Args:
        model: The model that they were made for, dense or not.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.

    Raises:
        ValueError: They are another model's; nothing has changed.
    """
    for layer in layers_of(model, masks):
        layer.apply_(masks[layer.name].to(layer.parameter.device))


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
