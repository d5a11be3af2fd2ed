"""Contract of all kinds of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from symprune_lightning import prune_model
from symprune_lightning.engine.layers.base import LayerKind, watch_layers
from symprune_lightning.engine.layers.kinds.conv1d import Conv1DKind
from symprune_lightning.engine.layers.kinds.linear import LinearKind
from symprune_lightning.engine.layers.select import all_layers, find_layers
from symprune_lightning.functional.registry import leaves

# a module of each kind with 6 inputs and 4 outputs, all biases zero; a new kind adds a line
EXAMPLES = {
    LinearKind: lambda: nn.Linear(6, 4, bias=False),
    Conv1DKind: lambda: Conv1D(4, 6),
}
KINDS = [kind for kind in leaves(LayerKind) if kind.__module__.startswith("symprune_lightning")]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def model(request):
    """A model with a module of the kind inside."""
    return nn.ModuleDict({"body": nn.Sequential(EXAMPLES[request.param](), nn.ReLU())})


def test_names_are_unique_and_resolve(model):
    layers = all_layers(model)
    names = [layer.name for layer in layers]
    assert names
    assert len(set(names)) == len(names)
    for layer, again in zip(layers, find_layers(model, names), strict=True):
        assert again.name == layer.name
        assert again.module is layer.module
        assert layer.name.startswith("body.0")


def test_view_shares_the_storage_of_the_parameter(model):
    for layer in all_layers(model):
        view = layer.view(layer.parameter.detach())
        assert view.dim() == 2
        assert view.shape == layer.shape
        view.zero_()
        assert not layer.matrix().any()


def test_visit_gets_the_input_of_the_matrix(model):
    """``x Wᵀ`` is the output of the module, for every call, and before it is computed."""
    visits = []
    layers = all_layers(model)
    module = model["body"][0]

    def visit(layer, x):
        visits.append((layer, x))
        layer.mask_(torch.zeros(layer.shape, dtype=torch.bool))

    x = torch.randn(2, 5, 6)
    dense = module(x)
    assert dense.any()
    weights = {layer.name: layer.matrix().clone() for layer in layers}
    with watch_layers(layers, visit):
        pruned = module(x)
    assert [layer.name for layer, _ in visits] == [layer.name for layer in layers]
    torch.testing.assert_close(visits[0][1] @ weights[visits[0][0].name].T, dense)
    assert not pruned.any(), "the layer was pruned before it was used"
    module(x)
    assert len(visits) == len(layers), "not watched any more"


def test_keyword_argument(model):
    module = model["body"][0]
    name = "input" if isinstance(module, nn.Linear) else "x"
    seen = []
    with watch_layers(all_layers(model), lambda layer, x: seen.append(x.shape)):
        module(**{name: torch.randn(3, 6)})
    assert seen == [(3, 6)]


def test_masks_and_weights_go_through_the_view(model):
    for layer in all_layers(model):
        dense = layer.matrix().clone()
        mask = torch.rand(layer.shape) > 0.5
        layer.mask_(mask)
        assert torch.equal(layer.matrix(), dense * mask)
        stored = layer.zero_mask(mask)
        assert stored.shape == layer.parameter.shape
        assert torch.equal(layer.view(stored), ~mask)
        weight = torch.randn(layer.shape)
        layer.copy_(weight)
        assert torch.equal(layer.matrix(), weight)


def test_module_of_another_kind_has_no_layers():
    for kind in KINDS:
        assert kind().layers("x", nn.LayerNorm(4)) == []
        for other, example in EXAMPLES.items():
            assert bool(kind().layers("x", example())) == (kind is other)


def test_a_kind_of_the_users_is_found_by_its_subclass():
    class Scaled(nn.Module):
        """``x Wᵀ`` with the weight stored as two halves of one vector."""

        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.randn(24))

        def forward(self, x):
            return x @ self.values.view(4, 6).T

    class ScaledKind(LinearKind):
        def layers(self, name, module):
            if not isinstance(module, Scaled):
                return []
            from symprune_lightning.engine.layers.base import Layer

            return [Layer(f"{name}.w", module, self, "values", lambda p: p.view(4, 6))]

    model = nn.Sequential(Scaled(), nn.Linear(4, 2))
    result = prune_model(model, [torch.randn(8, 6)], score="wanda")
    assert set(result.masks) == {"0.w", "1"}
    assert (model[0].values.view(4, 6) == 0).sum(1).tolist() == [3] * 4
    assert result.is_applied_to(model)
