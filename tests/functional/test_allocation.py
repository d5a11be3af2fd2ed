from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning.functional.allocation import (
    OWL,
    Allocation,
    AllocationMethod,
    LayerInfo,
    Progression,
    Search,
    Uniform,
)
from symprune_lightning.functional.registry import lookup
from symprune_lightning.functional.statistics import Moments, Statistics


def layers_of(sizes, outliers=(), allocation=OWL()):  # noqa: B008
    layers = []
    statistics = Statistics(input=Moments.of(torch.ones(4, 20)))
    for i, size in enumerate(sizes):
        weight = torch.ones(size, 20)
        if i in outliers:
            weight[0, 0] = 1000
        layers.append(
            LayerInfo(
                name=f"layer{i}",
                groups=size,
                group_size=20,
                block=i,
                depth=i / max(1, len(sizes) - 1),
                metric=allocation.layer_metric(weight, statistics),
            )
        )
    return layers


@pytest.mark.parametrize(
    "allocation",
    [
        Uniform(),
        Progression(),
        Progression(-0.3),
        OWL(),
        OWL(max_deviation=0.5, outlier_threshold=2.0),
    ],
)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.6, 0.95]),
)
def test_total_is_met_and_no_layer_is_out_of_range(allocation, sizes, sparsity):
    layers = layers_of(sizes, (0, 2), allocation)
    sparsities = allocation(layers, sparsity)
    target = sum(layer.num_pruned(sparsity) for layer in layers)
    assert sum(layer.num_pruned(sparsities[layer.name]) for layer in layers) >= target
    lower = [max(sparsities[layer.name] - 1e-6, 0) for layer in layers]
    pruned = sum(map(LayerInfo.num_pruned, layers, lower))
    assert pruned < target or not any(lower), "a lower constant would be enough"
    assert all(0 <= s <= 0.99 for s in sparsities.values())


def test_groups_round_down():
    layer = LayerInfo(name="layer", groups=3, group_size=10, block=0, depth=0.0)
    assert layer.num_weights == 30
    assert layer.num_pruned(0.57) == 3 * 5


def test_progression_is_arithmetic():
    levels = list(Progression(0.2)(layers_of([10] * 5), 0.6).values())
    assert levels == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    assert list(Progression()(layers_of([10]), 0.6).values()) == pytest.approx([0.6])


def test_owl_prunes_blocks_with_outliers_less():
    levels = OWL(max_deviation=0.08)(layers_of([10] * 4, (1,)), 0.6)
    assert levels["layer1"] == min(levels.values())
    spread = max(levels.values()) - min(levels.values())
    assert spread == pytest.approx(0.16)


def test_owl_without_outliers_is_uniform():
    assert OWL()(layers_of([10] * 4), 0.6) == pytest.approx(Uniform()(layers_of([10] * 4), 0.6))


def test_wrong_options():
    with pytest.raises(ValueError, match="slope is 2; it must be between"):
        Progression(2)
    with pytest.raises(ValueError, match=r"an allocation needs at most 0\.99"):
        Uniform()(layers_of([3]), 0.995)


def test_search():
    assert len(Search().candidates) == 4
    assert Search([OWL()]).candidates == (OWL(),)
    assert hash(Search([OWL()])) == hash(Search((OWL(),)))
    with pytest.raises(ValueError, match="at least one allocation"):
        Search(())
    with pytest.raises(TypeError, match=r"Search\(.*is none"):
        Search([Search()])


def test_search_is_selected_like_an_allocation():
    assert lookup(AllocationMethod, "search") == Search()
    assert lookup(AllocationMethod, "owl") == OWL()
    assert not issubclass(Search, Allocation)
