"""Contract of all kinds of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention
from transformers.pytorch_utils import Conv1D

from symprune_lightning import prune_model
from symprune_lightning.engine.layers.base import Layer, LayerKind, watch_layers
from symprune_lightning.engine.layers.changes import zero_masks
from symprune_lightning.engine.layers.find import all_layers, find_layers
from symprune_lightning.engine.layers.kinds.conv1d import Conv1DKind
from symprune_lightning.engine.layers.kinds.convolution import ConvolutionKind
from symprune_lightning.engine.layers.kinds.experts import PackedExpertsKind
from symprune_lightning.engine.layers.kinds.linear import LinearKind, ReadLinearKind
from symprune_lightning.engine.layers.kinds.stacked import AttentionInputKind, GroupedLinearKind
from symprune_lightning.engine.layers.kinds.xlnet import XLNetAttentionKind
from symprune_lightning.functional.registry import leaves
from tests.models import build


class Reads(nn.Module):
    """Multiplies by the weight of a child that it does not call, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.dt_proj = nn.Linear(6, 4)

    def forward(self, x):
        return (self.dt_proj.weight @ x.mT).mT


def experts() -> nn.Module:
    return build("mixtral").model.layers[0].mlp.experts


def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = x.flatten(0, 1)
    index = torch.arange(2 * len(tokens)).view(-1, 2) % 4
    return tokens, index, torch.full(index.shape, 0.5)


@dataclass(frozen=True)
class Example:
    """A module of a kind, with biases of zero.

    Attributes:
        build: Makes the module.
        inputs: Number of input features.
        arguments: Maps ``(batch, tokens, inputs)`` to the arguments of its forward.
        layers: Number of layers.
        matrix_input: Whether a layer's input is ``(..., tokens, inputs)`` and its output that of
            the module.
    """

    build: Callable[[], nn.Module]
    inputs: int = 6
    arguments: Callable[[torch.Tensor], tuple[Any, ...]] = lambda x: (x,)
    layers: int = 1
    matrix_input: bool = True


def xlnet() -> nn.Module:
    config = tf.XLNetConfig(vocab_size=8, d_model=6, n_layer=1, n_head=2, d_inner=8)
    module = XLNetRelativeAttention(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def attend(x: torch.Tensor) -> tuple[Any, ...]:
    h = x.transpose(0, 1)
    r = torch.linspace(-1, 1, 2 * h.numel()).view(2 * len(h), h.shape[1], h.shape[2])
    return h, None, None, None, r, None


def attention() -> nn.Module:
    return nn.MultiheadAttention(6, 2, bias=False, batch_first=True)


# a new kind adds a line
EXAMPLES: dict[type[LayerKind], Example] = {
    LinearKind: Example(lambda: nn.Linear(6, 4, bias=False)),
    ReadLinearKind: Example(Reads),
    Conv1DKind: Example(lambda: Conv1D(4, 6)),
    ConvolutionKind: Example(
        lambda: nn.Conv1d(6, 4, 3, groups=2, bias=False),
        arguments=lambda x: (x.mT,),
        layers=2,
        matrix_input=False,
    ),
    GroupedLinearKind: Example(
        lambda: DeepseekV4GroupedLinear(3, 8, 2),
        arguments=lambda x: (x.unflatten(-1, (2, 3)),),
        layers=2,
        matrix_input=False,
    ),
    AttentionInputKind: Example(
        attention, arguments=lambda x: (x, x, x), layers=4, matrix_input=False
    ),
    XLNetAttentionKind: Example(xlnet, arguments=attend, layers=5, matrix_input=False),
    PackedExpertsKind: Example(experts, inputs=32, arguments=route, layers=8, matrix_input=False),
}
KINDS = [kind for kind in leaves(LayerKind) if kind.__module__.startswith("symprune_lightning")]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def example(request):
    return EXAMPLES[request.param]


@pytest.fixture
def model(example):
    """A model with a module of the kind inside."""
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Sequential(example.build(), nn.ReLU())})


def call(model, example) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        output = model["body"][0](*example.arguments(torch.randn(2, 5, example.inputs)))
    return output if isinstance(output, torch.Tensor) else output[0]


def test_names_are_unique_and_resolve(model, example):
    layers = all_layers(model)
    names = [layer.name for layer in layers]
    assert len(names) == example.layers
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


def test_layers_of_a_parameter_do_not_overlap_and_cover_it(model):
    counts: dict[int, torch.Tensor] = {}
    for layer in all_layers(model):
        key = id(layer.parameter)
        counts.setdefault(key, torch.zeros(layer.parameter.shape))
        layer.view(counts[key]).add_(1)
    assert all((count == 1).all() for count in counts.values())


def test_visit_comes_before_the_use(model, example):
    """A layer that is pruned while it is visited contributes nothing, and then is not watched."""
    visited = []

    def visit(layer, x, tokens=None):
        assert x.shape[-1] == layer.shape[1]
        visited.append(layer.name)
        layer.mask_(torch.zeros(layer.shape, dtype=torch.bool))

    before = {module: dict(vars(module)) for module in model.modules()}
    assert call(model, example).any()
    with watch_layers(all_layers(model), visit):
        pruned = call(model, example)
    assert set(visited) == {layer.name for layer in all_layers(model)}
    if not isinstance(model["body"][0], XLNetRelativeAttention):  # which adds its input
        assert not pruned.any()
    assert len(visited) == len(set(visited))
    call(model, example)
    assert len(visited) == len(set(visited)), "not watched any more"
    assert {m: set(vars(m)) for m in model.modules()} == {m: set(v) for m, v in before.items()}


def test_watching_does_not_change_the_output(model, example):
    expected = call(model, example)
    with watch_layers(all_layers(model), lambda *_: None):
        assert torch.equal(call(model, example), expected)


def test_visits_get_the_inputs_of_the_matrices(model, example):
    """The output is linear in a layer's weight, with the inputs that were visited."""
    layers = all_layers(model)
    inputs: dict[str, list[torch.Tensor]] = {}
    gradients: dict[str, list[torch.Tensor]] = {}

    def keep(store):
        return lambda layer, x, tokens=None: store.setdefault(layer.name, []).append(
            x.detach().reshape(-1, x.shape[-1])
        )

    model.requires_grad_(requires_grad=False)
    torch.manual_seed(1)
    arguments = example.arguments(torch.randn(2, 5, example.inputs))
    module = model["body"][0]
    with watch_layers(layers, keep(inputs), keep(gradients)):
        output = module(*arguments)
        output = output if isinstance(output, torch.Tensor) else output[0]
        scale = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
        (output * scale).sum().backward()
    model.requires_grad_()
    output = module(*arguments)
    output = output if isinstance(output, torch.Tensor) else output[0]
    (output * scale).sum().backward()
    for layer in layers:
        if layer.name not in gradients:  # nn.MultiheadAttention does not return its projections
            assert "in_proj" in layer.name
            continue
        # the gradient of a matrix is the sum over tokens of output gradient times input
        expected = layer.view(layer.parameter.grad)
        pairs = zip(inputs[layer.name], gradients[layer.name], strict=True)
        found = sum(g.T @ x for x, g in pairs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_keyword_argument():
    seen = []
    for module, name in ((nn.Linear(6, 4), "input"), (Conv1D(4, 6), "x")):
        layers = all_layers(nn.ModuleDict({"body": module}))
        with watch_layers(layers, lambda layer, x, *_: seen.append(x.shape)):
            module(**{name: torch.randn(3, 6)})
    assert seen == [(3, 6)] * 2


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


def test_zero_masks_of_a_parameter_are_joined(model):
    layers = all_layers(model)
    masks = {layer.name: torch.rand(layer.shape) > 0.5 for layer in layers}
    joined = zero_masks(layers, masks)
    assert len(joined) == len({id(layer.parameter) for layer in layers})
    for layer in layers:
        pruned = joined[layer.module, layer.parameter_name]
        assert torch.equal(layer.view(pruned), ~masks[layer.name])


def test_module_of_another_kind_has_no_layers():
    for kind in KINDS:
        assert kind().layers("x", nn.LayerNorm(4)) == []
        for other, example in EXAMPLES.items():
            if {kind, other} == {AttentionInputKind, ReadLinearKind}:
                continue  # the output projection of attention is one that is read
            assert bool(kind().layers("x", example.build())) == (kind is other)


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
            return [Layer(f"{name}.w", module, self, "values", lambda p: p.view(4, 6))]

    model = nn.Sequential(Scaled(), nn.Linear(4, 2))
    result = prune_model(model, [torch.randn(8, 6)], score="wanda")
    assert set(result.masks) == {"0.w", "1"}
    assert (model[0].values.view(4, 6) == 0).sum(1).tolist() == [3] * 4
    assert result.is_applied_to(model)


def test_a_view_that_copies_is_an_error():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.randn(24))

        def forward(self, x):
            return x @ self.values.view(4, 6).T

    class CopyingKind(LinearKind):
        def layers(self, name, module):
            if not isinstance(module, Copies):
                return []
            return [Layer(f"{name}.w", module, self, "values", lambda p: p.view(4, 6).clone())]

    with pytest.raises(ValueError, match=r"layer 0.w is not zero where its mask prunes"):
        prune_model(nn.Sequential(Copies()), [torch.randn(8, 6)], score="wanda")


def test_a_convolution_in_another_memory_format():
    """Its weight cannot be viewed as a matrix, but is pruned where it is stored."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    result = prune_model(model, [torch.randn(2, 4, 6, 6)], score="wanda", update="maskedcg")
    assert result.is_applied_to(model)
    assert (model[0].weight == 0).sum() == 72


def test_a_convolution_with_its_own_forward_has_no_layer():
    class Padded(nn.Conv1d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (2, 0)))

    assert all_layers(nn.Sequential(Padded(4, 4, 3))) == []


def test_a_weight_that_its_parent_scales():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            scale = (self.fc.weight * 2.0 - self.fc.weight).abs().mean()
            return nn.functional.linear(input=x, weight=self.fc.weight) * scale

    result = prune_model(Scales(), [torch.randn(8, 4)], score="wanda")
    assert [report.tokens for report in result.layers] == [8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_experts_whose_grouped_kernel_does_not_exist(dtype):
    model = build("mixtral").to(dtype)
    tokens = {"input_ids": torch.arange(3, 35)[None]}
    assert prune_model(model, [tokens], score="wanda").is_applied_to(model)


def test_a_patched_forward_may_convert_its_input():
    layer = nn.Linear(8, 8, dtype=torch.float16)
    layer.forward = lambda x: nn.functional.linear(x.float(), layer.weight.float())
    assert prune_model(nn.Sequential(layer), [torch.randn(4, 8)], score="wanda").sparsity == 0.5
