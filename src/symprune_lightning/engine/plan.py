"""The pruning plan: a method resolved for every layer of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.select import decoder_blocks, expand_by_layer
from symprune_lightning.engine.method import PruningMethod
from symprune_lightning.functional.patterns import NM, Pattern, Unstructured
from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.scores import Magnitude


@dataclass(frozen=True)
class PruningPlan:
    """A method resolved for every layer of one model.

    Attributes:
        method: The method.
        layers: The layers to prune, in model order.
        patterns: Layer name to its budget.
        refiners: Layer name to the refiners of its mask, in order.
        block_indices: Layer name to the index of its decoder block.
    """

    method: PruningMethod
    layers: list[Layer]
    patterns: dict[str, Pattern]
    refiners: dict[str, Sequence[MaskRefiner]]
    block_indices: dict[str, int]

    @classmethod
    def resolve(cls, model: nn.Module, layers: list[Layer], method: PruningMethod) -> PruningPlan:
        """Expand the settings of a method over layers.

        Raises:
            ValueError: A setting matches no layer, or does not fit a layer's shape.
        """
        patterns = _patterns(layers, method)
        refiners = expand_by_layer(method.refine, layers)
        for layer in layers:
            with prefix_errors(layer):
                patterns[layer.name].check(layer.shape)
                if layer.name in refiners:
                    patterns[layer.name].swap_window()  # raises if no swap keeps the budget
        return cls(method, layers, patterns, refiners, _block_indices(model, layers))

    def comparison_groups(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Group layers whose weights compete with one another; most layers are alone."""
        groups: dict[object, list[Layer]] = {}
        for layer in layers:
            group = self.patterns[layer.name].group
            key: object = layer
            if group in ("block", "model"):
                key = (group, self.block_indices[layer.name] if group == "block" else 0)
            groups.setdefault(key, []).append(layer)
        return list(groups.values())

    def is_rowwise(self, layer: Layer) -> bool:
        """Return whether each row's mask can be computed without the other rows."""
        pattern = self.patterns[layer.name]
        return pattern.group == "output" and not (isinstance(pattern, NM) and pattern.permute)

    def with_sparsities(self, sparsities: Mapping[str, float]) -> PruningPlan:
        """Return the plan with another sparsity for each layer."""
        patterns: dict[str, Pattern] = {}
        for name, pattern in self.patterns.items():
            assert isinstance(pattern, Unstructured), "checked by PruningMethod"
            patterns[name] = replace(pattern, sparsity=sparsities[name])
        return replace(self, patterns=patterns)

    def by_magnitude(self) -> PruningPlan:
        """Return the plan with scores by magnitude, for layers without statistics."""
        method = replace(self.method, score=Magnitude(), refine={}, update=None, solver=None)
        return replace(self, method=method, refiners={})

    def for_trial(self) -> PruningPlan:
        """Return the plan with scores only, for the trials of a search."""
        method = replace(self.method, refine={}, update=None, reconstruct=None)
        return replace(self, method=method, refiners={})


@contextmanager
def prefix_errors(layer: Layer) -> Iterator[None]:
    """Prefix the messages of ``ValueError`` with the name of the layer."""
    try:
        yield
    except ValueError as error:
        if layer.name in str(error):
            raise
        raise ValueError(f"layer {layer.name}: {error}") from error


def num_groups(layer: Layer, pattern: Pattern) -> tuple[int, int]:
    """Return the number of groups of a layer and the size of each."""
    groups, group_size = pattern.groups(torch.empty(layer.shape, device="meta")).shape
    return groups, group_size


def _patterns(layers: Sequence[Layer], method: PruningMethod) -> dict[str, Pattern]:
    if method.pattern is not None or not isinstance(method.sparsity, Mapping):
        level = 0.0 if isinstance(method.sparsity, Mapping) else method.sparsity
        pattern = method.budget(level)
        return {layer.name: pattern for layer in layers}
    levels = expand_by_layer(method.sparsity, layers)
    missing = [layer.name for layer in layers if layer.name not in levels]
    if missing:
        raise ValueError(
            f"no entry of sparsity matches {len(missing)} layers, such as {missing[0]}; add "
            f"'re:.*' as the last entry, or add them to `ignore`"
        )
    return {name: method.budget(level) for name, level in levels.items()}


def _block_indices(model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Map layers to decoder blocks; a layer outside has the index of the layer before it."""
    blocks = enumerate(decoder_blocks(model, layers))
    index_of = {module: i for i, block in blocks for module in block.modules()}
    indices: dict[str, int] = {}
    current = 0
    for layer in layers:
        current = index_of.get(layer.module, current)
        indices[layer.name] = current
    return indices
