from __future__ import annotations

import pytest
import torch

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
        assert report.target_sparsity == report.sparsity


def test_sparsity_by_layer_that_leaves_layers_out():
    with pytest.raises(ValueError, match=r"no entry of sparsity matches 1 layers, such as 2; add"):
        prune_model(mlp(), DATA, sparsity={"0": 0.5})


def test_only_some_layers():
    model = build("llama")
    result = prune_model(model, batches(), only=["re:.*layers.1.*"])
    assert len(result.masks) == 7
    assert (model.model.layers[0].mlp.up_proj.weight != 0).all()
    with pytest.raises(ValueError, match="'re:nothing' matches none"):
        prune_model(build("llama"), batches(), only=["re:nothing"])


@pytest.mark.parametrize("order", ["block", "dense"])
def test_layers_of_a_block_compete(order):
    model = build("llama")
    result = prune_model(model, batches(), group="block", sparsity=0.4, calibration_order=order)
    for block in ("layers.0", "layers.1"):
        masks = [m for n, m in result.masks.items() if block in n]
        total = sum(m.numel() for m in masks)
        assert sum(int((~m).sum()) for m in masks) == int(total * 0.4)
    assert len({round(r.sparsity, 6) for r in result.layers}) > 2


def test_all_layers_compete():
    result = prune_model(
        mlp(), DATA, group="model", sparsity=0.4, calibration_order="dense", score="wanda"
    )
    zeros = sum(int((~m).sum()) for m in result.masks.values())
    assert zeros == int(0.4 * (16 * 24 + 24 * 8))
    together = torch.cat(
        [(mlp()[i].weight.abs()).detach().flatten() for i in (0, 2)]  # magnitude needs no data
    )
    masks = prune_model(
        mlp(), [], group="model", calibration_order="dense", score="magnitude"
    ).masks
    kept = torch.cat([masks["0"].flatten(), masks["2"].flatten()])
    assert together[kept].min() > together[~kept].max()


def test_groups_that_need_another_calibration_order():
    with pytest.raises(
        ValueError,
        match="group 'block' compares all scores of a block at once: use",
    ):
        prune_model(mlp(), DATA, group="block")
    with pytest.raises(ValueError, match="use calibration_order='dense'"):
        prune_model(mlp(), DATA, group="model", calibration_order="block")


def test_score_without_effect_in_its_group_warns():
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
@pytest.mark.parametrize("change", [{"update": "obsupdate"}, {"solver": SparseGPT()}])
def test_updates_and_solvers(change, options):
    plain = prune_model(mlp(), DATA, **options)
    model = mlp()
    result = prune_model(model, DATA, **change, **options)
    first = result.layers[0]
    assert first.sparsity == first.target_sparsity == 0.5
    assert first.error_updated < plain.layers[0].error
    assert torch.equal(model[0].weight != 0, result.masks["0"])
    if "update" in change:
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
        assert result.layers[0].target_sparsity == pytest.approx(0.42, abs=0.02)
        assert result.layers[-1].target_sparsity - result.layers[
            0
        ].target_sparsity == pytest.approx(0.3)


def zeros(result):
    return sum(int((~mask).sum()) for mask in result.masks.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": SparseGPT(), "refine": "dsnot"},
            "chooses mask and weights itself: use ref",
        ),
        ({"allocation": "owl", "pattern": NM(2, 4)}, "which NM.* does not allow"),
        (
            {"allocation": "owl", "sparsity": {"re:.*": 0.5}},
            "combined with an allocation",
        ),
        ({"allocation": "owl", "group": "model", "calibration_order": "dense"}, "does not allow"),
        (
            {"sparsity": {"re:.*": 0.5}, "group": "block", "calibration_order": "block"},
            "cannot be combined with group",
        ),
        ({"sparsity": "0.5"}, "sparsity is '0.5', a str; pass a number"),
        ({"sparsity": {"re:.*": "0.5"}}, "sparsity is '0.5', a str; pass a number"),
        ({"sparsity": True}, "sparsity is True, a bool; pass a number"),
        ({"pattern": "2:4", "sparsity": 0.7}, r"sparsity=0.7 has no effect with NM\(n=2, m=4"),
        ({"pattern": "2:4", "sparsity": {"0": 0.3}}, r"has no effect with NM\(n=2, m=4"),
        ({"score": "sparsegpt"}, "is a solver, not a score: use solver='sparsegpt'"),
        ({"update": "obs"}, "no WeightUpdate is called 'obs'"),
        ({"allocation": "even"}, "no AllocationMethod is called 'even'"),
    ],
)
def test_settings_that_cannot_be_combined(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        prune_model(model, DATA, **options)
    assert (model[0].weight != 0).all()
