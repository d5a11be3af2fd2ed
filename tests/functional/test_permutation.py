from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.patterns import NM
from symprune_lightning.functional.permutation import (
    channel_permutation,
    reassign_position,
    retained_score,
)


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    nm=st.sampled_from([(2, 4), (1, 2), (1, 4), (3, 5)]),
    seed=st.integers(0, 999),
)
def test_a_permutation_that_never_retains_less(rows, groups, nm, seed):
    n, m = nm
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, groups * m, generator=generator).pow(4)
    order = channel_permutation(score, n, m)
    assert sorted(order.tolist()) == list(range(groups * m))
    least = retained_score(score, n, m) * (1 - 1e-6)
    assert retained_score(score[:, order], n, m) >= least
    assigned = reassign_position(score, order, n, m, seed % m)
    least = retained_score(score[:, order], n, m) * (1 - 1e-6)
    assert retained_score(score[:, assigned], n, m) >= least


def test_assignment_is_the_best_of_all():
    score = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)).pow(4)
    original = torch.arange(12)
    assigned = reassign_position(score, original, 2, 4, 1)
    best = 0.0
    for moved in itertools.permutations([1, 5, 9]):
        order = original.clone()
        order[[1, 5, 9]] = torch.tensor(moved)
        best = max(best, retained_score(score[:, order], 2, 4))
    assert abs(retained_score(score[:, assigned], 2, 4) - best) < 1e-6


def test_retains_clearly_more_where_channels_differ():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(32, 64, generator=generator) * torch.rand(64, generator=generator).pow(4)
    order = channel_permutation(score, 2, 4)
    assert retained_score(score[:, order], 2, 4) > 1.05 * retained_score(score, 2, 4)


def test_masks_are_in_the_models_own_order():
    from symprune_lightning.engine.prune import prune_model
    from tests.models import mlp

    data = [torch.randn(60, 16) * torch.rand(16).pow(3)]
    plain = prune_model(mlp(), data, pattern="2:4")
    model = mlp()
    result = prune_model(
        model, data, pattern=NM(2, 4, permute=True), refine="exactswap", update="obsupdate"
    )
    assert result.layers[0].error_updated < result.layers[0].error_refined
    assert result.layers[0].error_updated < plain.layers[0].error
    for name, order in result.permutations.items():
        mask = result.masks[name]
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
        assert (mask[:, order].reshape(-1, 4).sum(1) == 2).all()
    assert set(result.permutations) == {"0", "2"}
    assert plain.permutations == {}
