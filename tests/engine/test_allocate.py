from __future__ import annotations

import pytest
import torch
from torch import nn

from symprune_lightning import OWL, Progression, Search
from symprune_lightning.engine.prune import prune_model
from tests.models import batches, build


def test_search_selects_the_smallest_change_of_the_output():
    result = prune_model(build("llama"), batches(), sparsity=0.6, allocation="search")
    assert [trial.error for trial in result.trials] == sorted(t.error for t in result.trials)
    assert {trial.allocation for trial in result.trials} == set(Search().candidates)
    best = result.trials[0].allocation
    alone = prune_model(build("llama"), batches(), sparsity=0.6, allocation=best)
    assert all(torch.equal(result.masks[name], mask) for name, mask in alone.masks.items())


def test_search_restores_the_dense_weights():
    """Refined and updated layers come from the dense weights, as without a search."""
    options = {"sparsity": 0.6, "refine": "exactswap", "update": "obsupdate"}
    searched, alone = build("llama"), build("llama")
    best = prune_model(searched, batches(), allocation=Search(), **options).trials[0].allocation
    prune_model(alone, batches(), allocation=best, **options)
    for (name, mine), other in zip(searched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_search_of_a_model_without_a_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    result = prune_model(model, [torch.randn(5, 8)], allocation=Search((Progression(0.5), OWL())))
    assert len(result.trials) == 2
    assert result.sparsity == pytest.approx(0.5, abs=0.1)


def test_search_needs_an_output():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="forward returns no tensor"):
        prune_model(
            model, [torch.randn(5, 8)], allocation="search", forward=lambda m, x: [m(x), None][1]
        )


def test_search_compares_outputs_and_not_inputs_of_an_excluded_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    searched = Search((Progression(0.5), OWL()))
    result = prune_model(model, [torch.randn(5, 8)], allocation=searched, ignore=["0"])
    assert all(trial.error > 0 for trial in result.trials)


def test_search_composes_with_offload(tmp_path):
    options = {"sparsity": 0.6, "allocation": "search"}
    plain = prune_model(build("llama"), batches(), **options)
    assert prune_model(build("llama"), batches(), offload=tmp_path, **options).masks == plain.masks
