from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.allocation import (
    OWL,
    Allocation,
    Progression,
    Search,
    Share,
    Uniform,
)
from symprune_lightning.functional.statistics import Moments, Statistics


def shares(sizes, outliers=(), allocation=OWL()):  # noqa: B008
    found = []
    for i, size in enumerate(sizes):
        weight = torch.ones(size, 20)
        if i in outliers:
            weight[0, 0] = 1000
        found.append(
            Share(
                name=f"layer{i}",
                groups=size,
                group_size=20,
                block=i,
                depth=i / max(1, len(sizes) - 1),
                measured=allocation.measure(
                    weight, Statistics(input=Moments.of(torch.ones(4, 20)))
                ),
            )
        )
    return found


@pytest.mark.parametrize(
    "allocation",
    [Uniform(), Progression(), Progression(-0.3), OWL(), OWL(lamda=0.5, m=2.0), Search()],
)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.6, 0.95]),
)
def test_total_is_met_and_no_layer_is_out_of_range(allocation, sizes, sparsity):
    layers = shares(sizes, (0, 2), allocation)
    levels = allocation(layers, sparsity)
    wanted = sum(s.zeros(sparsity) for s in layers)
    assert sum(s.zeros(levels[s.name]) for s in layers) >= wanted
    lower = [max(levels[s.name] - 1e-6, 0) for s in layers]
    assert sum(map(Share.zeros, layers, lower)) < wanted or not any(lower), "no more than it takes"
    assert all(0 <= level <= 0.99 for level in levels.values())


def test_zeros_are_what_the_pattern_prunes():
    share = Share(name="layer", groups=3, group_size=10, block=0, depth=0.0)
    assert share.weights == 30
    assert share.zeros(0.57) == 3 * 5


def test_progression_is_arithmetic():
    levels = list(Progression(0.2)(shares([10] * 5), 0.6).values())
    assert levels == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    assert list(Progression()(shares([10]), 0.6).values()) == pytest.approx([0.6])


def test_owl_spares_blocks_with_outliers():
    levels = OWL(lamda=0.08)(shares([10] * 4, (1,)), 0.6)
    assert levels["layer1"] == min(levels.values())
    spread = max(levels.values()) - min(levels.values())
    assert spread == pytest.approx(0.16)


def test_owl_without_outliers_is_uniform():
    assert OWL()(shares([10] * 4), 0.6) == pytest.approx(Uniform()(shares([10] * 4), 0.6))


def test_wrong_options():
    with pytest.raises(ValueError, match="slope is 2; it must be between"):
        Progression(2)
    with pytest.raises(ValueError, match="leaves an allocation nothing to divide"):
        Uniform()(shares([3]), 0.995)


@pytest.mark.parametrize("allocation", Allocation.__subclasses__())
def test_is_a_frozen_dataclass(allocation):
    assert allocation.__dataclass_params__.frozen


def test_search_has_something_to_try():
    assert len(Search().choices()) == 4
    assert Search([OWL()]).choices() == (OWL(),)
    with pytest.raises(ValueError, match="at least one allocation"):
        Search(())
