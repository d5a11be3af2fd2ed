from __future__ import annotations

from symprune_lightning import PruningMethod
from symprune_lightning.engine.layers.select import prunable_layers
from symprune_lightning.engine.plan import PruningPlan
from tests.models import build


def test_layers_outside_blocks_have_the_index_of_the_block_before():
    model = build("vit")
    names = ["classifier", "re:.*"]
    plan = PruningPlan.resolve(model, prunable_layers(model, only=names), PruningMethod())
    assert plan.block_indices["classifier"] == 1
    assert set(plan.block_indices.values()) == {0, 1}


def test_layers_of_one_block_compete_in_group_block():
    model = build("llama")
    layers = prunable_layers(model)
    method = PruningMethod(group="block", calibration_order="block")
    groups = PruningPlan.resolve(model, layers, method).comparison_groups(layers)
    assert [len(group) for group in groups] == [7, 7]
    plan = PruningPlan.resolve(model, layers, PruningMethod())
    assert [len(group) for group in plan.comparison_groups(layers)] == [1] * 14
