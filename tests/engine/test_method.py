from __future__ import annotations

import pytest
import torch
from torch import nn

from symprune_lightning import (
    NM,
    OWL,
    ExactSwap,
    OBSUpdate,
    OutputWanda,
    Progression,
    PruningWarning,
    SparseGPT,
    prune_model,
)
from tests.models import batches, build, mlp

DATA = [torch.randn(60, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2)]


def test_sparsity_by_layer():
    result = prune_model(
        build("llama"),
        batches(),
        sparsity={"re:.*down_proj": 0.25, "re:.*mlp.*": 0.75, "re:.*": 0.5},
    )
    for report in result.layers:
        kind = "down" if "down" in report.name else "mlp" if "mlp" in report.name else "rest"
        assert report.sparsity == {"down": 0.25, "mlp": 0.75, "rest": 0.5}[kind]
        assert report.asked == report.sparsity


def test_sparsity_by_layer_that_leaves_layers_out():
    with pytest.raises(
        ValueError, match=r"no entry of sparsity matches 1 layers, such as 2; end w"
    ):
        prune_model(mlp(), DATA, sparsity={"0": 0.5})


def test_only_some_layers():
    model = build("llama")
    result = prune_model(model, batches(), only=["re:.*layers.1.*"])
    assert len(result.masks) == 7
    assert (model.model.layers[0].mlp.up_proj.weight != 0).all()
    with pytest.raises(ValueError, match="'re:nothing' matches none"):
        prune_model(build("llama"), batches(), only=["re:nothing"])


@pytest.mark.parametrize("schedule", ["block", "dense"])
def test_layers_of_a_block_compete(schedule):
    model = build("llama")
    result = prune_model(model, batches(), group="block", sparsity=0.4, schedule=schedule)
    for block in ("layers.0", "layers.1"):
        masks = [m for n, m in result.masks.items() if block in n]
        total = sum(m.numel() for m in masks)
        assert sum(int((~m).sum()) for m in masks) == int(total * 0.4)
    assert len({round(r.sparsity, 6) for r in result.layers}) > 2


def test_all_layers_compete():
    result = prune_model(mlp(), DATA, group="model", sparsity=0.4, schedule="dense", score="wanda")
    zeros = sum(int((~m).sum()) for m in result.masks.values())
    assert zeros == int(0.4 * (16 * 24 + 24 * 8))
    together = torch.cat(
        [(mlp()[i].weight.abs()).detach().flatten() for i in (0, 2)]  # magnitude needs no data
    )
    masks = prune_model(mlp(), [], group="model", schedule="dense", score="magnitude").masks
    kept = torch.cat([masks["0"].flatten(), masks["2"].flatten()])
    assert together[kept].min() > together[~kept].max()


def test_groups_that_need_another_schedule():
    with pytest.raises(ValueError, match="group 'block' needs all scores of a block at once"):
        prune_model(mlp(), DATA, group="block")
    with pytest.raises(ValueError, match="use schedule='dense'"):
        prune_model(mlp(), DATA, group="model", schedule="block")


def test_score_that_decides_nothing_in_its_group_warns():
    for options in ({"group": "output"}, {"pattern": "2:4"}):
        with pytest.warns(PruningWarning, match="the mask is that of Magnitude; use group='layer'"):
            result = prune_model(mlp(), DATA, score=OutputWanda(), **options)
        magnitude = prune_model(mlp(), [], score="magnitude", **options)
        assert torch.equal(result.masks["0"], magnitude.masks["0"])
    result = prune_model(mlp(), DATA, score=OutputWanda(), group="layer")
    magnitude = prune_model(mlp(), [], score="magnitude", group="layer")
    assert not torch.equal(result.masks["0"], magnitude.masks["0"])


def test_half_pruned_model_keeps_its_zeros_and_reaches_the_total():
    model = mlp()
    prune_model(model, DATA, sparsity=0.25, score="wanda")
    zero = {i: model[i].weight == 0 for i in (0, 2)}
    result = prune_model(model, DATA, sparsity=0.5, refine="exactswap")
    assert result.sparsity == 0.5
    for i in (0, 2):
        assert (model[i].weight[zero[i]] == 0).all()


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"group": "layer"}])
@pytest.mark.parametrize("update", ["obsupdate", SparseGPT()])
def test_updates(update, options):
    plain = prune_model(mlp(), DATA, **options)
    model = mlp()
    result = prune_model(model, DATA, update=update, **options)
    first = result.layers[0]
    assert first.sparsity == first.asked == 0.5
    assert first.error_updated < plain.layers[0].error
    assert torch.equal(model[0].weight != 0, result.masks["0"])
    if update == "obsupdate":
        assert torch.equal(result.masks["0"], plain.masks["0"])


def test_refine_and_update_compose():
    result = prune_model(mlp(), DATA, refine=ExactSwap(), update=OBSUpdate())
    for report in result.layers:
        assert report.error_updated < report.error_refined < report.error


@pytest.mark.parametrize("group", ["output", "input", "layer"])
@pytest.mark.parametrize("allocation", ["uniform", Progression(0.3), OWL()])
def test_allocations_prune_as_much_as_one_sparsity_everywhere(allocation, group):
    options = {"sparsity": 0.57, "group": group}
    plain = zeros(prune_model(build("llama", seed=1), batches(), **options))
    result = prune_model(build("llama", seed=1), batches(), allocation=allocation, **options)
    most = max(m.shape[group == "input"] for m in result.masks.values())
    assert plain <= zeros(result) <= plain + len(result.masks) * (1 if group == "layer" else most)
    if allocation == "uniform":
        assert zeros(result) == plain
    if allocation == Progression(0.3):
        assert result.layers[0].asked == pytest.approx(0.42, abs=0.02)
        assert result.layers[-1].asked - result.layers[0].asked == pytest.approx(0.3)


def zeros(result):
    return sum(int((~mask).sum()) for mask in result.masks.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": SparseGPT(), "refine": "dsnot"}, "chooses its own mask: refine=None"),
        ({"allocation": "owl", "pattern": NM(2, 4)}, "does not leave open"),
        ({"allocation": "owl", "sparsity": {"re:.*": 0.5}}, "does not go with an allocation"),
        ({"allocation": "owl", "group": "model", "schedule": "dense"}, "does not leave open"),
        ({"sparsity": {"re:.*": 0.5}, "group": "block", "schedule": "block"}, "does not go with"),
        ({"update": "obs"}, "no WeightUpdate is called 'obs'"),
        ({"allocation": "even"}, "no Allocation is called 'even'"),
    ],
)
def test_what_does_not_go_together(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        prune_model(model, DATA, **options)
    assert (model[0].weight != 0).all()


def test_layers_outside_blocks_belong_to_the_one_before():
    model = nn.Sequential(build("vit"), nn.Linear(2, 2))
    from symprune_lightning.engine.layers import prunable_layers
    from symprune_lightning.engine.method import block_indices

    layers = prunable_layers(model[0])
    indices = block_indices(model[0], layers)
    assert indices["classifier"] == 1
    assert set(indices.values()) == {0, 1}
