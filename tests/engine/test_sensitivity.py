from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from symprune_lightning import (
    Communicator,
    GradientWanda,
    PruningWarning,
    Sensitivity,
    StreamedCheckpoint,
    prune_model,
)
from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.layers.select import prunable_layers
from symprune_lightning.engine.placement import WeightPlacement
from symprune_lightning.engine.sensitivity import measure_sensitivity
from tests.groups import run_group
from tests.models import LANGUAGE, batches, build, mlp


def measured(model, data, **options):
    layers = prunable_layers(model)
    calibration = Calibration(model, data, lambda m, b: m(**b), WeightPlacement(model))
    return measure_sensitivity(layers, calibration, **options)


def test_gradients_are_those_of_autograd():
    """With a loss of known gradient: half the squared output, so that ∂L/∂y = y."""
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(10, 6)
    calibration = Calibration(model, [x[:4], x[4:]], lambda m, b: m(b), WeightPlacement(model))
    statistics = measure_sensitivity(
        prunable_layers(model), calibration, loss=lambda m, b: 0.5 * m(b).square().sum()
    )
    y = model(x).detach().double()
    torch.testing.assert_close(statistics["0"].output_gradient, y.square().mean(0))
    torch.testing.assert_close(statistics["0"].input.norm, x.double().square().mean(0).sqrt())


def test_drawn_labels_give_the_fisher_information():
    """One layer of logits: E[(∂L/∂y)²] = p (1 − p) on average over labels drawn from p."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5)), torch.randn(1, 3).expand(40_000, 3)
    calibration = Calibration(model, [x], lambda m, b: m(b), WeightPlacement(model))
    (statistics,) = measure_sensitivity(prunable_layers(model), calibration).values()
    p = model(x[:1]).softmax(-1)[0].detach().double()
    torch.testing.assert_close(statistics.output_gradient, p * (1 - p), rtol=0.03, atol=0)


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_layer_of_every_architecture_has_gradients(name):
    model = build(name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    statistics = measured(model, batches(name))
    assert statistics.keys() == {layer.name for layer in prunable_layers(model)}
    for value in statistics.values():
        assert (value.output_gradient > 0).any()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_padding_does_not_count():
    short = batches(count=1, size=1, length=8)
    ids = nn.functional.pad(short[0]["input_ids"], (0, 5))
    mask = nn.functional.pad(torch.ones(1, 8, dtype=torch.long), (0, 5))
    plain = measured(build("llama"), short)
    padded = measured(build("llama"), [{"input_ids": ids, "attention_mask": mask}])
    for name, value in plain.items():
        assert padded[name].input.tokens == value.input.tokens == 8
        torch.testing.assert_close(
            padded[name].output_gradient, value.output_gradient, rtol=1e-3, atol=1e-9
        )


def test_number_of_batches():
    data = batches(count=4)
    few = measured(build("llama"), data, max_batches=2)
    first = measured(build("llama"), data[:2])
    for name, value in first.items():
        assert torch.equal(few[name].output_gradient, value.output_gradient)


@pytest.mark.parametrize("order", ["layer", "block", "dense"])
def test_score_with_gradients_competes_between_rows(order):
    options = {"group": "layer", "calibration_order": order}
    result = prune_model(build("llama"), batches(), score="gradientwanda", **options)
    wanda = prune_model(build("llama"), batches(), score="wanda", **options)
    assert result.sparsity == wanda.sparsity == 0.5
    assert result.masks != wanda.masks
    kept = result.masks["model.layers.0.mlp.up_proj"].sum(1)
    assert kept.unique().numel() > 1


def test_score_with_gradients_is_wanda_within_rows():
    with pytest.warns(PruningWarning, match="the mask is that of Wanda"):
        result = prune_model(build("llama"), batches(), score=GradientWanda())
    assert result.masks == prune_model(build("llama"), batches(), score="wanda").masks


@pytest.mark.parametrize("refine", [None, "exactswap"])
@pytest.mark.parametrize("score", ["ria", "gradientwanda"])
def test_allocation_keeps_the_total_and_its_bounds(score, refine):
    options = {"score": score, "refine": refine, "sparsity": 0.6, "group": "layer"}
    plain = prune_model(build("llama"), batches(), **options)
    result = prune_model(build("llama"), batches(), allocation="sensitivity", **options)
    zeros = [sum(r.num_zeros for r in x.layers) for x in (plain, result)]
    assert zeros[0] <= zeros[1] <= zeros[0] + len(result.layers)
    targets = [report.target_sparsity for report in result.layers]
    assert max(targets) - min(targets) > 0.1
    assert all(0.6 - 0.25 < target < 0.6 + 0.25 for target in targets)


def test_refining_and_updates_keep_the_rows_of_the_first_mask():
    options = {"score": "gradientwanda", "group": "layer", "sparsity": 0.6}
    first = prune_model(mlp(), data(), **options, forward=logits).masks
    for more in ({"refine": "exactswap"}, {"update": "obsupdate"}):
        result = prune_model(mlp(), data(), **options, **more, forward=logits)
        assert torch.equal(result.masks["0"].sum(1), first["0"].sum(1))


def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(60, 16, generator=generator) for _ in range(2)]


def logits(model, batch):
    return model(batch)


def test_loss_of_a_model_without_logits():
    def forward(model, batch):
        return {"hidden": model(batch)}

    options = {"score": "gradientwanda", "group": "layer", "forward": forward}
    with pytest.raises(ValueError, match=r"sensitivity needs logits, .* forward returned dict"):
        prune_model(mlp(), data(), **options)
    result = prune_model(mlp(), data(), **options, loss=lambda m, b: m(b).square().sum())
    assert result.sparsity == 0.5


@pytest.mark.parametrize("shape", [(1,), (8, 2, 2)])
def test_an_output_that_is_no_classes(shape):
    def forward(model, batch):
        return model(batch)[:, : shape[0]] if len(shape) == 1 else model(batch).view(-1, 1, 2, 2)

    options = {"score": "gradientwanda", "group": "layer", "forward": forward}
    with pytest.raises(ValueError, match=r"two classes or more, and forward returned Tensor of"):
        prune_model(mlp(), data(), **options)


def test_gradients_that_are_all_zero():
    def loss(model, batch):
        return (0 * model(batch)).sum()

    with pytest.raises(ValueError, match="all gradients of the loss are zero"):
        prune_model(mlp(), data(), score="gradientwanda", group="layer", loss=loss)


def test_no_batches():
    with pytest.raises(ValueError, match="calibration set is empty"):
        prune_model(mlp(), [], allocation=Sensitivity())


def test_resumed_with_the_same_masks(tmp_path):
    from tests.engine.test_journal import StopAfter, small

    options = {"score": "gradientwanda", "group": "layer", "allocation": "sensitivity"}
    expected = prune_model(small(), batches(), **options)
    with pytest.raises(RuntimeError):
        prune_model(small(), batches(), **options, journal=tmp_path, hooks=[StopAfter(9)])
    resumed = prune_model(small(), batches(), **options, journal=tmp_path)
    assert resumed.masks == expected.masks


def test_refused_for_a_streamed_checkpoint(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    options = {"score": "gradientwanda", "group": "layer"}
    checkpoint = StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse")
    with pytest.raises(ValueError, match="cannot be combined with streaming"), checkpoint:
        prune_model(checkpoint.model, batches(), placement=checkpoint, **options)
    assert not (tmp_path / "sparse").exists()


def shard_and_prune(rank, size, folder):
    model = build("llama")
    mesh = init_device_mesh("cpu", (size,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="not supported for sharded models"):
        prune_model(
            model,
            batches(),
            allocation="sensitivity",
            communicator=Communicator.from_default_group(),
        )


def test_refused_for_a_sharded_model(tmp_path):
    run_group(shard_and_prune, 2, tmp_path)
