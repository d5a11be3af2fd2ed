"""Experts packed into one parameter, as in the mixtures of experts of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.layers.base import Layer, LayerKind, Tokens, Visit
from symprune_lightning.engine.layers.routing import (
    current_routing,
    measure_all_tokens,
    note_routing,
)
from symprune_lightning.engine.layers.stand_in import Listener, WatchedParameter, watch_uses

UNIFORM_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes that transformers' ``use_experts_implementation`` sets on an experts module."""

OTHER_CLASSES: dict[str, dict[str, bool]] = {
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},
    "InklingSharedExperts": {"gate_proj": False, "up_proj": False, "down_proj": False},
    "JetMoeParallelExperts": {"weight": False},
    "Llama4TextExperts": {"gate_up_proj": True, "down_proj": True},
    "LongcatFlashExperts": {"gate_up_proj": False, "down_proj": False},
    "Step3p7Experts": {"gate_up_proj": False, "down_proj": False},
}
"""Other classes of transformers: their parameters, in order of use, and whether these are stored as
``(in, out)``. By name, since the shape of a square matrix does not say."""

LOOPS_OVER_EXPERTS = ("DbrxExpertGLU", "LongcatFlashExperts", "Step3p7Experts")
"""Classes that use all matrices of one expert before those of the next."""


@dataclass(frozen=True)
class ExpertView:
    """The matrix of one expert in a packed parameter.

    Attributes:
        index: Index of the expert.
        is_transposed: Whether the parameter stores ``(in, out)``.
        num_experts: Number of experts, if the parameter stacks them along its rows, in two
            dimensions; ``None`` if it has a dimension of experts.
    """

    index: int
    is_transposed: bool
    num_experts: int | None = None

    def __call__(self, parameter: Tensor) -> Tensor:
        """Return the view ``(out_features, in_features)``."""
        if self.num_experts is not None:
            parameter = parameter.view(self.num_experts, -1, parameter.shape[-1])
        matrix = parameter[self.index]
        return matrix.mT if self.is_transposed else matrix


class PackedExpertsKind(LayerKind):
    """Experts whose matrices are packed into one parameter ``(experts, out, in)``.

    Each expert's matrix is a layer, named ``experts.gate_up_proj.3``. The model's own forward runs
    on stand-ins for the parameters (``engine/layers/stand_in.py``); experts of the uniform class of
    transformers run its implementation ``"grouped_mm"`` meanwhile, in which all experts are visited
    in order by every batch.
    """

    def layers(self, name: str, module: nn.Module) -> list[Layer]:
        """See `LayerKind`."""
        layouts = packed_parameters(module)
        views = {
            key: [
                ExpertView(index, is_transposed, None if parameter.dim() == 3 else count)
                for index in range(count)
            ]
            for key, (parameter, is_transposed, count) in layouts.items()
        }
        found = [
            Layer(
                f"{name}.{key}.{view.index}" if name else f"{key}.{view.index}",
                module,
                self,
                parameter_name=key,
                view=view,
                is_routed=True,
            )
            for key in views
            for view in views[key]
        ]
        if type(module).__name__ in LOOPS_OVER_EXPERTS:
            found.sort(key=lambda layer: _view(layer).index)  # stable
        return found

    def watch(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return _ExpertsWatch(module, visit).inputs(layers)

    def watch_gradients(
        self, module: nn.Module, layers: Sequence[Layer], visit: Visit
    ) -> AbstractContextManager[None]:
        """See `LayerKind`."""
        return _ExpertsWatch(module, visit).gradients(layers)

    def measure_all_tokens(
        self, module: nn.Module, is_needed: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """See `LayerKind`.

        Raises:
            ValueError: The module's forward takes no router indices.
        """
        if not is_uniform(module):
            raise ValueError(
                f"experts='all' requires an experts module that transformers decorates with "
                f"use_experts_implementation, which {type(module).__name__} is not: use "
                f"experts='routed'"
            )
        return measure_all_tokens(module, is_needed)


def is_uniform(module: nn.Module) -> bool:
    """Return whether an experts module is of the uniform class of transformers."""
    return all(hasattr(module, flag) for flag in UNIFORM_FLAGS)


def packed_parameters(module: nn.Module) -> dict[str, tuple[Tensor, bool, int]]:
    """Return the packed parameters of an experts module, in the order in which it uses them.

    Returns:
        Parameter name to the parameter, whether it is stored as ``(in, out)``, and the number of
        experts; empty for any other module.
    """
    name = type(module).__name__
    if is_uniform(module):
        is_transposed = bool(module.is_transposed)
        layouts = dict.fromkeys(("gate_up_proj", "up_proj", "down_proj"), is_transposed)
    elif name in OTHER_CLASSES and type(module).__module__.startswith("transformers"):
        layouts = OTHER_CLASSES[name]
    else:
        return {}
    present: dict[str, Tensor | None] = {key: module._parameters.get(key) for key in layouts}
    return {
        key: (parameter, layouts[key], _num_experts(module, parameter))
        for key, parameter in present.items()
        if parameter is not None and parameter.dim() in (2, 3)
    }


def _num_experts(module: nn.Module, parameter: Tensor) -> int:
    if parameter.dim() == 2:
        return int(module.moe_num_experts)  # type: ignore[arg-type]
    # LongCat has unused matrices for its experts that return their input
    routed = getattr(module, "num_routed_experts", None)
    return routed if isinstance(routed, int) else len(parameter)


def _indices(selected: Tensor, count: int) -> Tensor | None:
    """Return the indices of selected tokens; ``None`` if they are not of a batch of ``count``."""
    return selected.nonzero()[:, 0] if len(selected) == count else None


def _view(layer: Layer) -> ExpertView:
    assert isinstance(layer.view, ExpertView)
    return layer.view


class _ExpertsWatch:
    """Observes the layers of one experts module.

    Args:
        module: The module.
        visit: Called with each layer and its input, or its output's gradient.
    """

    def __init__(self, module: nn.Module, visit: Visit) -> None:
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(
                f"{type(module).__name__} is distributed by expert parallelism, in which ranks "
                f"hold different experts: use strategy='ddp' or FSDP2"
            )
        self.module, self.visit = module, visit
        self.layouts = packed_parameters(module)
        self.is_dense = type(module).__name__ == "Llama4TextExperts"
        # which tokens of a batch were routed to a layer, for modules that compute all of them
        self._routed: dict[Layer, Tokens] = {}

    @contextmanager
    def inputs(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Visit the layers with their inputs."""
        with self._stand_ins(layers, self._on_input, None):
            yield

    @contextmanager
    def gradients(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Visit the layers with the gradients of their outputs."""
        with self._stand_ins(layers, self._keep_routed, self._on_gradient):
            yield

    @contextmanager
    def _stand_ins(
        self, layers: Sequence[Layer], on_input: Listener, on_gradient: Listener | None
    ) -> Iterator[None]:
        members: dict[str, dict[int, Layer]] = {}
        for layer in layers:
            members.setdefault(layer.parameter_name, {})[_view(layer).index] = layer
        with ExitStack() as stack:
            if is_uniform(self.module):
                stack.enter_context(_grouped_mm(self.module))
                stack.enter_context(note_routing(self.module))
            for name, by_index in members.items():
                parameter = WatchedParameter(
                    self.module,
                    name,
                    is_transposed=self.layouts[name][1],
                    is_stacked=True,
                    only=self._only,
                )
                stack.enter_context(watch_uses(parameter, by_index, on_input, on_gradient))
            yield

    def _only(self) -> int | None:
        """Return the expert that is measured in the current call, if only one is."""
        routing = current_routing(self.module)
        return None if routing is None else routing.only

    def _on_input(self, layer: Layer, x: Tensor, rows: slice | None) -> None:
        routing = current_routing(self.module)
        if self.is_dense:
            routed = x.any(-1)
            self.visit(layer, x[routed], lambda count: _indices(routed, count))
        elif routing is None or rows is None:
            self.visit(layer, x)
        elif routing.is_measured and routing.only in (None, _view(layer).index):
            is_first = layer.parameter_name == next(iter(self.layouts))
            if routing.only is not None and is_first:
                x = routing.hidden_states
                everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
                self.visit(layer, x, lambda count: _indices(everything, count))
            else:
                self.visit(layer, x, lambda count: routing.tokens(rows, count))

    def _keep_routed(self, layer: Layer, x: Tensor, rows: slice | None) -> None:
        routing = current_routing(self.module)
        if self.is_dense:
            routed = x.detach().any(-1)
            self._routed[layer] = partial(_indices, routed)
        elif routing is not None and rows is not None:
            self._routed[layer] = partial(routing.tokens, rows)

    def _on_gradient(self, layer: Layer, gradient: Tensor, rows: slice | None) -> None:
        tokens = self._routed.get(layer)
        if self.is_dense and tokens is not None:
            gradient = gradient[tokens(len(gradient))]
        self.visit(layer, gradient, tokens)


@contextmanager
def _grouped_mm(module: nn.Module) -> Iterator[None]:
    """Run the implementation whose products the stand-ins know; fused kernels would bypass them."""
    config: Any = module.config
    before = config._experts_implementation
    config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        config._experts_implementation = before
