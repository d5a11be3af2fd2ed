"""Histograms of scores, and the choice of the layers that are drawn."""

from __future__ import annotations

import pytest
import torch

from symprune_lightning import PruningHooks, prune_model
from symprune_lightning.callbacks.report.figures import (
    chosen_layers,
    figures,
    histogram,
)
from tests.models import batches, build


class Scores(PruningHooks):
    def __init__(self) -> None:
        self.layers = {}

    def on_layer_scored(self, layer, scores, mask):
        self.layers[layer] = scores, mask


def test_histograms_of_a_run_show_its_scores_and_masks():
    model, scores = build("llama"), Scores()
    prune_model(model, batches(), hooks=[scores], sparsity=0.25)
    assert len(scores.layers) == 14
    for name, (score, mask) in scores.layers.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(mask, weight != 0)
        kept = score.masked_fill(~mask, torch.inf).amin(1)
        assert (kept >= score.masked_fill(mask, -torch.inf).amax(1)).all()
        distribution = histogram(score, mask)
        assert sum(distribution.pruned) == pytest.approx(0.25, abs=0.02)
        assert sum(distribution.kept) == pytest.approx(0.75, abs=0.02)


def test_no_histogram_without_different_scores():
    assert histogram(torch.full((4, 4), -torch.inf), torch.zeros(4, 4, dtype=torch.bool)) is None
    assert histogram(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)) is None


def test_chosen_layers():
    assert chosen_layers([str(i) for i in range(11)]) == ["0", "2", "4", "6", "8", "10"]
    assert chosen_layers(["a"]) == ["a"]


def test_a_curve_per_reconstructed_block():
    layers = [{"name": "fc", "sparsity": 0.5, "error": None, "error_refined": None, "swaps": 0}]
    blocks = [{"name": f"blocks.{i}", "errors": [0.4, 0.3, 0.2 + i / 10]} for i in range(3)]
    drawn = figures(layers, {}, {}, {}, blocks)
    assert drawn.keys() == {"reconstruction"}
    axes = drawn["reconstruction"].axes[0]
    curves = [line.get_ydata().tolist() for line in axes.get_lines()]
    assert curves == [pytest.approx([1, 0.75, 0.5 + i / 4]) for i in range(3)]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["blocks.0", "blocks.2"]


def test_figures_without_data_are_left_out():
    layers = [{"name": "fc", "sparsity": 0.5, "error": None, "error_refined": None, "swaps": 0}]
    assert not figures(layers, {}, {}, {})
    masks = {"fc": torch.eye(4, dtype=torch.bool)}
    times = {"loading": 1.0}
    measured = [{**layers[0], "error": 0.2, "error_refined": 0.1, "swaps": 3}]
    drawn = figures(measured, masks, {"fc": histogram(torch.rand(4, 4), masks["fc"])}, times)
    assert drawn.keys() == {"error", "swaps", "time", "scores", "masks"}
    panels = [axes.get_title() for axes in drawn["error"].axes]
    assert panels == ["error by the mask of the score", "error by the refined mask"]


def test_a_line_for_each_kind_of_layer():
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("attn.q", "mlp.up", "x.1.y")]
    layers = [
        {"name": name, "sparsity": 0.1 * i, "error": None, "error_refined": None, "swaps": i}
        for i, name in enumerate(names)
    ]
    drawn = figures(layers, {}, {}, {})
    assert drawn.keys() == {"sparsity", "swaps"}
    lines = drawn["swaps"].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["attn.q", "mlp.up", "x.y"]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 1, 2]] * 3
    assert [line.get_ydata().tolist() for line in lines] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    legend = [text.get_text() for text in drawn["swaps"].legends[0].get_texts()]
    assert legend == ["attn.q", "mlp.up", "x.y"]


def test_a_block_without_an_error():
    blocks = [{"name": "a", "errors": [0.0, 0.0]}, {"name": "b", "errors": [0.2, 0.1]}]
    layers = [{"name": "fc", "sparsity": 0.5, "error": None, "error_refined": None, "swaps": 0}]
    assert "reconstruction" in figures(layers, {}, {}, {}, blocks)
