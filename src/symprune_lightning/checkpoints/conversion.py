"""Conversion between the tensors of checkpoint files and the parameters of a model.

transformers renames, splits and stacks tensors on loading: a file holds ``experts.3.w1.weight``,
the model one parameter for all experts. Here, the same conversions are applied to some tensors at a
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from symprune_lightning.checkpoints.weight_files import read_tensors
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.find import find_layers


@dataclass
class _Group:
    """Tensors of the files that are converted together.

    Attributes:
        target: The first key that they are converted to.
        converter: The conversion; ``None`` if one tensor is only renamed.
        sources: Tensor names in the files, with the pattern that each matched.
    """

    target: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """All keys that the tensors are converted to."""
        if self.converter is None:
            return [self.target]
        patterns = self.converter.target_patterns
        return [self.target.replace(patterns[0], pattern) for pattern in patterns]


class CheckpointConversion:
    """The tensors of a checkpoint, by the keys of a model's state dict.

    Args:
        model: The model, on the meta device or not.
        folder: Folder of the checkpoint.
        files: Tensor name to file, see ``weight_files``.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, files: Mapping[str, str]) -> None:
        self._model, self._folder, self._files = model, folder, files
        transforms = get_model_conversion_mapping(model)
        self._groups = _group_sources(model, transforms, files)
        # transformers keeps the conversions that it used in loading, to revert them in saving
        vars(model)["_weight_conversions"] = [t for t in transforms if t.was_used()]
        self._check_names()

    def _check_names(self) -> None:
        """Check that every parameter is in the files, and is written under the names read.

        Raises:
            ValueError: A parameter is missing, or the files have other names than those that
                transformers saves.
        """
        state = {k: x.to("meta") for k, x in self._model.state_dict().items() if k in self._groups}
        names = revert_weight_conversion(self._model, state).keys()
        tied = self._model.get_expanded_tied_weights_keys(all_submodels=True)
        unknown = sorted(name for name in names if name not in self._files and name not in tied)
        if unknown:
            raise ValueError(
                f"{self._folder} has no tensor {unknown[0]}, the name under which transformers "
                f"saves it for {type(self._model).__name__}: load the model, save it with "
                f"save_pretrained, and stream that checkpoint"
            )
        for name, _ in self._model.named_parameters():
            if name not in self._groups and name not in tied:
                raise ValueError(
                    f"{self._folder} has no tensor for {name} of {type(self._model).__name__}, "
                    f"neither of this name nor one that transformers converts to it: load the full "
                    f"model instead of streaming it"
                )

    def __contains__(self, key: str) -> bool:
        return key in self._groups

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers by key.

        Args:
            keys: Keys of the model's state dict, which the checkpoint holds.
        """
        wanted = set(keys)
        groups = {id(group): group for group in (self._groups[key] for key in wanted)}
        for group in groups.values():
            for key, tensor in self._convert(group).items():
                if key in wanted:
                    yield key, tensor

    def revert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors as the files hold them.

        Args:
            state: Parameters and buffers by key of the model's state dict.
        """
        reverted = revert_weight_conversion(self._model, dict(state))
        return {name: tensor for name, tensor in reverted.items() if name in self._files}

    def _convert(self, group: _Group) -> dict[str, Tensor]:
        names = [name for name, _ in group.sources]
        tensors = dict(read_tensors(self._folder, self._files, names))
        if group.converter is None:
            return {group.target: tensors[names[0]]}
        converter = deepcopy(group.converter)
        for name, pattern in group.sources:
            tensor: Any = tensors.pop(name)  # annotated as a future, which only loading uses
            converter.add_tensor(group.target, name, pattern, tensor)
        converted = converter.convert(group.target, model=self._model, config=self._model.config)
        return {key: x[0] if isinstance(x, list) else x for key, x in converted.items()}


def _group_sources(
    model: PreTrainedModel, transforms: Sequence[Any], names: Iterable[str]
) -> dict[str, _Group]:
    """Map keys of the model's state dict to the tensors that they are made of."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    groups: dict[str, _Group] = {}
    # in this order the experts of a stack come by their number
    for name in sorted(names, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in groups:
            converter = None if pattern is None else by_pattern[pattern]
            groups[target] = _Group(target, converter)
        groups[target].sources.append((name, pattern or name))
    return {key: group for group in list(groups.values()) for key in group.targets}


def stored_tensors(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Any]:
    """Return the manifest's entry about layers that a saved checkpoint holds under other names.

    transformers saves packed experts in the format of published checkpoints: often one tensor or
    two for each expert.

    Args:
        model: The model.
        names: Names of layers.

    Returns:
        ``{"tensors": ...}``, layer name to tensor names, for packed experts that are converted;
        empty if there are none.
    """
    packed: dict[str, list[Layer]] = {}
    prefixes = {module: name for name, module in model.named_modules()}
    for layer in find_layers(model, names):
        if layer.is_routed:
            key = f"{prefixes[layer.module]}.{layer.parameter_name}"
            packed.setdefault(key, []).append(layer)
    tensors: dict[str, list[str]] = {}
    for key, layers in packed.items():
        shape = layers[0].parameter.shape
        # every matrix holds the number of its expert, without memory for its entries
        numbers = torch.arange(shape[0], dtype=torch.int32)
        marked = numbers.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        reverted = revert_weight_conversion(model, {key: marked})
        if key in reverted:
            continue
        holders: dict[int, list[str]] = {}
        for name, tensor in reverted.items():
            holders.setdefault(int(tensor.flatten()[0]), []).append(name)
        for layer in layers:
            number = int(layer.name.rpartition(".")[2])
            tensors[layer.name] = sorted(holders.get(number, []))
    return {"tensors": tensors} if tensors else {}
