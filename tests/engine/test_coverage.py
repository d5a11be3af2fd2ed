from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from symprune_lightning import PruningWarning, StreamedCheckpoint, prune_model
from tests.models import DECODER, batches, build, llama


class Own(nn.Module):
    """A block that multiplies by a parameter in its own way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.mixing = nn.Parameter(torch.randn(width, 8))
        self.scale = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + (x @ self.mixing.T).mean(-1, keepdim=True)


def test_a_dense_model_is_covered_in_full():
    result = prune_model(build("llama"), batches(), score="wanda")
    assert result.coverage == 1
    named = [(weight.name, weight.reason, weight.in_block) for weight in result.left_dense]
    assert named == [("lm_head.weight", "output projection", False)]


def test_weights_without_a_layer_are_counted_named_and_warned_about():
    model = nn.ModuleList([Own(8), Own(8)])
    with pytest.warns(PruningWarning, match=r"50% of the weights.*0.mixing \(parameter of Own"):
        result = prune_model(
            model, [torch.randn(4, 8)], score="wanda", forward=lambda m, x: m[1](m[0](x))
        )
    assert result.coverage == 0.5
    assert [(w.name, w.num_weights) for w in result.left_dense] == [
        ("0.mixing", 64),
        ("1.mixing", 64),
    ]
    assert result.sparsity == 0.5


def test_what_the_settings_exclude_is_named_and_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = prune_model(build("llama"), batches(), score="wanda", ignore=["re:.*mlp.*"])
    assert result.coverage < 0.5
    in_blocks = [weight for weight in result.left_dense if weight.in_block]
    assert {weight.reason for weight in in_blocks} == {"ignored"}
    assert all("mlp" in weight.name for weight in in_blocks)


class Recurrent(nn.Module):
    """Most of its weights are beside its only block."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.up = nn.ConvTranspose1d(64, 16, 1)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.up(self.lstm(x)[0].mT).mT)


def test_weights_beside_the_blocks_are_named_and_warned_about():
    with pytest.warns(PruningWarning, match=r"9\d% of the weights were left dense.*lstm.weight_hh"):
        result = prune_model(Recurrent(), [torch.randn(3, 5, 16)])
    assert result.coverage == 1
    names = {weight.name for weight in result.left_dense if not weight.in_block}
    assert names == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "up.weight"}


def test_a_small_remainder_is_not_warned_about():
    model = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), Own(2)])
    model[1].linear = nn.Linear(64, 64, bias=False)
    model[1].mixing = nn.Parameter(torch.randn(2, 64))
    model[1].scale = nn.Parameter(torch.ones(1, 1, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = prune_model(
            model, [torch.randn(4, 64)], score="wanda", forward=lambda m, x: m[1](m[0](x))
        )
    assert 0.95 < result.coverage < 1


def test_a_model_without_blocks_is_measured_as_a_whole():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(24, 4))
    with pytest.warns(PruningWarning, match="depthwise convolution"):
        result = prune_model(model, [torch.randn(2, 4, 8)], score="wanda")
    assert result.coverage == 96 / (96 + 12)
    assert result.left_dense[0].reason == "depthwise convolution"


def test_tables_beside_the_blocks_are_not_warned_about():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(100, 8)
            self.positions = nn.Parameter(torch.randn(50, 8))
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

        def forward(self, x):
            return self.blocks[0](self.bag(x) + self.positions[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = prune_model(Tables(), [torch.randint(100, (4, 3))], score="wanda")
    assert [(w.name, w.in_block) for w in result.left_dense] == [("positions", False)]


def test_a_head_with_one_output_is_named():
    config = LlamaConfig(**DECODER, num_labels=1)
    result = prune_model(LlamaForSequenceClassification(config), batches(), score="wanda")
    assert [(w.name, w.reason) for w in result.left_dense] == [("score.weight", "head")]


def test_a_tied_projection_of_a_streamed_model_is_not_named(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    with StreamedCheckpoint(str(tmp_path / "model"), str(tmp_path / "out")) as checkpoint:
        result = prune_model(checkpoint.model, batches(), score="wanda", placement=checkpoint)
        checkpoint.save({})
    assert result.left_dense == []


def test_layers_that_lose_all_weights_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight *= 1e-3
    options = {"score": "magnitude", "group": "model", "calibration_order": "dense"}
    with pytest.warns(PruningWarning, match="all weights of these layers were pruned: 0"):
        prune_model(model, [torch.randn(4, 8)], **options)
