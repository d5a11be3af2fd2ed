"""Pruning of layers a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.functional import tensors
from tests.models import batches, build

METHODS = {
    "magnitude": {"score": "magnitude"},
    "wanda": {"score": "wanda"},
    "ria": {"score": "ria"},
    "ria-r2dsnot": {"score": "ria", "refine": "r2dsnot"},
    "2:4": {"score": "ria", "pattern": "2:4"},
    "not-by-rows": {"score": "stochria"},
    "layer": {"score": "wanda", "group": "layer"},
    "update": {"score": "ria", "update": "obsupdate"},
}


class Scores(PruningHooks):
    def __init__(self):
        self.scored = {}

    def on_layer_scored(self, layer, scores, mask):
        self.scored[layer] = (scores.clone(), mask.clone())


def run(method, **options):
    model = build("llama")
    result = prune_model(model, batches(), **METHODS[method], **options)
    return model, result


@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_matter(method, monkeypatch):
    whole_model, whole = run(method)
    monkeypatch.setattr(tensors, "WEIGHTS_AT_ONCE", 100)
    model, result = run(method)
    assert result.masks == whole.masks
    for a, b in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(a, b)
    for report, expected in zip(result.layers, whole.layers, strict=True):
        assert report.swaps == expected.swaps
        if expected.error_refined is not None:
            assert report.error_refined == pytest.approx(expected.error_refined, rel=1e-5)


@pytest.mark.parametrize("method", ["ria", "not-by-rows"])
def test_scores_are_observed_whole(method, monkeypatch):
    whole = Scores()
    run(method, hooks=[whole])
    monkeypatch.setattr(tensors, "WEIGHTS_AT_ONCE", 100)
    hook = Scores()
    _, result = run(method, hooks=[hook])
    assert hook.scored.keys() == result.masks.keys()
    for name, (scores, mask) in hook.scored.items():
        assert torch.equal(mask, result.masks[name])
        assert torch.allclose(scores, whole.scored[name][0])


def test_already_zero_weights_in_one_chunk(monkeypatch):
    monkeypatch.setattr(tensors, "WEIGHTS_AT_ONCE", 100)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30))
    with torch.no_grad():
        model[0].weight[7, :15] = 0
    result = prune_model(model, [torch.randn(50, 20)], score="ria")
    assert not result.masks["0"][7, :15].any()
    assert result.masks["0"][7].sum() == 5
    assert (result.masks["0"].sum(1) == 10)[torch.arange(30) != 7].all()
