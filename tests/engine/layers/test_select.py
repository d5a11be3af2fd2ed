from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers.pytorch_utils import Conv1D

from symprune_lightning.engine.layers.find import all_layers, find_layers
from symprune_lightning.engine.layers.select import (
    decoder_blocks,
    expand_by_layer,
    matching,
    prunable_layers,
)
from symprune_lightning.engine.prune import prune_model
from tests.models import LANGUAGE, build, mlp


def names(model, **options):
    return [layer.name for layer in prunable_layers(model, **options)]


def test_order_is_that_of_the_model():
    assert names(mlp()) == ["0", "2"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_lm_head_is_ignored_by_default(name):
    assert not [n for n in names(build(name)) if "lm_head" in n]


def test_tied_weights_are_not_pruned_even_if_nothing_is_ignored():
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(ValueError, match="nothing to prune"):
        names(model, only=["lm_head"])
    assert names(build("llama"), only=["lm_head"]) == ["lm_head"]


def test_a_weight_shared_by_two_layers_is_listed_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert names(nn.Sequential(first, second)) == ["0"]


def test_ignore_by_name_and_by_pattern():
    model = build("llama")
    kept = names(model, ignore=["re:.*mlp.*", "re:.*lm_head", "model.layers.0.self_attn.q_proj"])
    assert len(kept) == 7
    assert not [n for n in kept if "mlp" in n or n == "model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("entry", ["layers.0", "re:.*nothing", "q_proj"])
def test_ignore_that_matches_nothing_says_so(entry):
    with pytest.raises(ValueError, match=rf"'{entry}' matches none of the 15 layers.*model.layers"):
        prunable_layers(build("llama"), ignore=[entry])


def test_invalid_regular_expression():
    with pytest.raises(ValueError, match="is not a valid regular expression"):
        matching("re:(", ["a"])


def test_model_without_layers():
    with pytest.raises(ValueError, match="nothing to prune: Sequential has no linear layers"):
        prunable_layers(nn.Sequential(nn.ReLU()))


def test_quantised_layer():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer 0 holds torch.int8.*before quantising"):
        prunable_layers(nn.Sequential(layer))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_a_quantised_module_of_another_library(dtype):
    """Such modules (of GPTQ, compressed-tensors) have packed buffers, and no weight."""
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 4).to(dtype))
    model.model.layers[1].mlp.down_proj = packed
    message = r"quantised: model.layers.1.mlp.down_proj.qweight holds .*; prune the model before"
    with pytest.raises(ValueError, match=message):
        prunable_layers(model)


def test_layer_without_storage():
    with pytest.raises(ValueError, match="layer 0 is on the meta device"):
        prunable_layers(nn.Sequential(nn.Linear(4, 4, device="meta")))


def test_conv1d_is_read_and_zeroed_transposed():
    module = Conv1D(3, 5)  # 5 inputs, 3 outputs
    (layer,) = all_layers(nn.ModuleDict({"c": module}))
    assert layer.shape == (3, 5)
    assert torch.equal(layer.matrix(), module.weight.T)
    mask = torch.rand(3, 5) > 0.5
    layer.mask_(mask)
    assert torch.equal(module.weight == 0, ~mask.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32_and_stays_half(dtype):
    module = nn.Linear(4, 4).to(dtype)
    (layer,) = all_layers(nn.Sequential(module))
    assert layer.matrix().dtype == torch.float32
    kept = module.weight.detach().clone()
    layer.mask_(torch.eye(4, dtype=torch.bool))
    assert module.weight.dtype == dtype
    assert torch.equal(module.weight.detach(), kept * torch.eye(4, dtype=dtype))


@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])
def test_blocks_are_found_by_structure(name):
    model = build(name)
    layers = prunable_layers(model)
    blocks = list(decoder_blocks(model, layers))
    assert len(blocks) == 2
    assert type(blocks[0]) is type(blocks[1])
    inside = [layer for layer in layers if any(layer.module in b.modules() for b in blocks)]
    assert len(layers) == len(inside)


def test_settings_by_layer_take_the_first_match():
    layers = prunable_layers(build("llama"))
    spread = expand_by_layer({"model.layers.0.mlp.up_proj": 1, "re:.*mlp.*": 2}, layers)
    assert spread["model.layers.0.mlp.up_proj"] == 1
    assert spread["model.layers.1.mlp.up_proj"] == 2
    assert len(spread) == 6


def test_computed_weights_are_refused():
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer 0 computes its weight"):
        prunable_layers(nn.Sequential(normed))
    masked = torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.1)
    with pytest.raises(ValueError, match="layer 0 computes its weight"):
        prunable_layers(nn.Sequential(masked))


def test_heads_of_several_layers_are_ignored_by_default():
    model = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "lm_head": nn.ModuleDict({"dense": nn.Linear(4, 4)})}
    )
    assert names(model) == ["body"]


def test_find_layers_resolves_names_in_the_given_order():
    model = mlp()
    assert [layer.module for layer in find_layers(model, ["2", "0"])] == [model[2], model[0]]
    with pytest.raises(KeyError, match="1"):
        find_layers(model, ["1"])


class Quantised(torch.Tensor):
    """A tensor of a quantisation library, which states a floating dtype."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor)


class Tagged(torch.Tensor):
    """A subclass that behaves as a tensor."""


def test_quantised_tensor_subclasses_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Quantised))
    with pytest.raises(ValueError, match="layer 0 holds a Quantised, which is quantised"):
        prunable_layers(model)


def test_other_tensor_subclasses_are_pruned():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Tagged))
    result = prune_model(model, [torch.randn(8, 4)], score="wanda")
    assert result.is_applied_to(model)
    assert int((model[0].weight == 0).sum()) == 8


def test_entries_that_have_no_effect():
    layers = prunable_layers(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    assert expand_by_layer({"0": 1, "re:[12]": 2, "re:.*": 3}, layers) == {"0": 1, "1": 2, "2": 2}
    with pytest.raises(ValueError, match="'re:1' has no effect, since earlier entries match all"):
        expand_by_layer({"re:.*": 1, "re:1": 2}, layers)
