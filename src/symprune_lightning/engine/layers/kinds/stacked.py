"""Linear layers whose weight is a stack of matrices, each with inputs of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.stand_in import WatchedParameter
from symprune_lightning.engine.layers.stand_in_kind import StandInKind


@dataclass(frozen=True)
class StackView:
    """One matrix of a stack along the rows of a parameter.

    Attributes:
        index: Index of the matrix.
        count: Number of matrices.
    """

    index: int
    count: int

    def __call__(self, parameter: Tensor) -> Tensor:
        """Return the view ``(out_features, in_features)``."""
        rows = len(parameter) // self.count
        return parameter[self.index * rows : (self.index + 1) * rows]


def num_groups(module: nn.Module) -> int:
    """Return the number of groups of a grouped linear layer; 1 for any other module."""
    names = {cls.__name__ for cls in type(module).__mro__}
    # by name: the attribute alone does not say that the weight is used group by group
    return int(module.n_groups) if "DeepseekV4GroupedLinear" in names else 1  # type: ignore[arg-type]


class GroupedLinearKind(StandInKind):
    """Linear layers whose outputs are divided into groups with inputs of their own.

    As ``o_a_proj`` of DeepSeek-V4. Each group is a layer, named ``o_a_proj.0``.
    """

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        count = num_groups(module)
        if count == 1:
            return []
        views = [StackView(index, count) for index in range(count)]
        return [Layer(f"{name}.{view.index}", module, self, view=view) for view in views]

    def parameters(
        self, module: nn.Module, layers: Sequence[Layer]
    ) -> Iterator[tuple[WatchedParameter, dict[int, Layer]]]:
        """See `StandInKind`."""
        yield _stack(module, layers)


class AttentionInputKind(StandInKind):
    """The packed input projection of ``nn.MultiheadAttention``.

    The projections of queries, keys and values are layers, named ``in_proj_weight.0`` to ``.2``.
    Its output projection is a `ReadLinearKind`. The function of attention does not return the
    projections, so their gradients are not observed: all outputs of these layers count the same.
    """

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        is_packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        if not is_packed:
            return []
        key = "in_proj_weight"
        prefix = f"{name}.{key}" if name else key
        views = [StackView(index, 3) for index in range(3)]
        return [Layer(f"{prefix}.{v.index}", module, self, key, view=v) for v in views]

    def parameters(
        self, module: nn.Module, layers: Sequence[Layer]
    ) -> Iterator[tuple[WatchedParameter, dict[int, Layer]]]:
        """See `StandInKind`."""
        yield _stack(module, layers)


def _stack(module: nn.Module, layers: Sequence[Layer]) -> tuple[WatchedParameter, dict[int, Layer]]:
    parameter = WatchedParameter(module, layers[0].parameter_name, is_stacked=True)
    return parameter, {_index(layer): layer for layer in layers}


def _index(layer: Layer) -> int:
    assert isinstance(layer.view, StackView)
    return layer.view.index
