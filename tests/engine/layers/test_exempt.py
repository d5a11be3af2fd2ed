from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from symprune_lightning import prune_model
from symprune_lightning.engine.layers.exempt import exempt_layers
from symprune_lightning.engine.layers.find import all_layers
from symprune_lightning.engine.layers.select import prunable_layers

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def reasons(model: nn.Module) -> dict[str, str]:
    return exempt_layers(model, all_layers(model))


@pytest.mark.parametrize(
    "build",
    [
        lambda: tf.RwkvForCausalLM(
            tf.RwkvConfig(**SMALL, attention_hidden_size=32, context_length=32)
        ),
        lambda: tf.BertLMHeadModel(
            tf.BertConfig(
                **SMALL,
                num_attention_heads=4,
                intermediate_size=64,
                is_decoder=True,
                tie_word_embeddings=False,
            )
        ),
    ],
    ids=["rwkv", "bert"],
)
def test_output_projections_of_any_name(build):
    model = build()
    names = {module: name for name, module in model.named_modules()}
    head = names[model.get_output_embeddings()]
    assert "lm_head" not in head
    assert reasons(model)[head] == "output projection"
    result = prune_model(model, [], score="magnitude")
    assert head not in result.masks
    assert head in prune_model(model, [], score="magnitude", only=[head]).masks


class Router(nn.Module):
    """A router with a hidden layer."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, experts)


class Attention(nn.Module):
    """Attention with as many outputs of ``k_proj`` as there are experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.k_proj, self.o_proj = nn.Linear(8, experts), nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.attention = Attention(experts)
        self.gate = nn.Linear(8, experts)
        self.router = Router(experts)
        self.shared_expert_gate = nn.Linear(8, 1)
        self.shared_expert = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))


def test_routers_are_found_by_structure():
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "score": nn.Linear(8, 2)})
    found = {name for name, reason in reasons(model).items() if reason == "router"}
    expected = {"gate", "router.first", "router.second", "shared_expert_gate"}
    assert found == {f"layers.{i}.{name}" for i in range(2) for name in expected}


def test_regular_expressions_do_not_select_routers():
    model = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
    names = [layer.name for layer in prunable_layers(model, only=["re:.*"])]
    assert "layers.0.gate" not in names
    assert "layers.0.experts.0" in names
    named = prunable_layers(model, only=["re:.*experts.*", "layers.0.gate"])
    assert "layers.0.gate" in [layer.name for layer in named]


def test_ignore_adds_to_what_is_exempt():
    model = nn.ModuleDict(
        {"body": nn.Linear(4, 4), "up": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}
    )
    assert [layer.name for layer in prunable_layers(model, ignore=["up"])] == ["body"]


def test_patch_embeddings():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 2, 2))
    assert reasons(model) == {"0": "patch embedding"}


def test_adapters_are_exempt_and_their_base_layers_are_not():
    peft = pytest.importorskip("peft")
    config = tf.LlamaConfig(**SMALL, intermediate_size=64, num_attention_heads=4)
    model = peft.get_peft_model(
        tf.LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapters = [name for name, reason in reasons(model).items() if reason == "adapter"]
    assert len(adapters) == 4
    assert all("lora_" in name for name in adapters)
    names = [layer.name for layer in prunable_layers(model)]
    assert (
        len(
            [
                name
                for name in names
                if name.endswith("layers.0.self_attn.q_proj")
                or name.endswith("layers.1.self_attn.q_proj")
            ]
        )
        == 2
    )
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    prune_model(model, [{"input_ids": torch.arange(3, 19)[None]}], score="wanda")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_the_head_next_to_a_mixture_is_no_router():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = Block()
            self.head = nn.Linear(8, 4)

    assert "head" not in reasons(Net())


def bert():
    config = tf.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
    )
    return tf.BertForSequenceClassification(config)


@pytest.mark.parametrize("wrap", [False, True])
def test_heads_are_spared_unless_they_are_named(wrap):
    model = nn.ModuleDict({"model": bert()}) if wrap else bert()
    prefix = "model." if wrap else ""
    names = [layer.name for layer in prunable_layers(model)]
    assert f"{prefix}classifier" not in names
    assert len(names) == 7  # six of the block, and the pooler
    named = [layer.name for layer in prunable_layers(model, only=[f"{prefix}classifier"])]
    assert named == [f"{prefix}classifier"]


def test_a_tower_next_to_the_base_model_is_no_head():
    model = bert()
    model.tower = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)])})
    model.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    names = {layer.name for layer in prunable_layers(model)}
    assert "tower.blocks.0" in names
    assert not names & {"head.0", "head.1", "classifier"}


def test_the_classifier_of_a_model_like_those_of_timm():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, 2)

        def get_classifier(self):
            return self.fc

    assert [layer.name for layer in prunable_layers(Model())] == ["body"]
