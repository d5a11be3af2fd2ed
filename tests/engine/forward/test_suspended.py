from __future__ import annotations

import contextvars
import copy
import warnings
from types import SimpleNamespace

import greenlet
import pytest
import torch
import transformers as tf
from torch import nn

from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.forward.recorder import Recorder
from symprune_lightning.engine.forward.suspended import SuspendedForward
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.layers.select import prunable_layers
from symprune_lightning.engine.placement import WeightPlacement
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.errors import PruningError, PruningWarning
from tests.models import DECODER, batches, build, mlp

ORDERS = ("layer", "block", "dense")


class Names(PruningHooks):
    """Collects the names of layers in the order of pruning."""

    def __init__(self, names):
        self.names = names

    def on_layer_pruned(self, report, mask):
        self.names.append(report.name)


def recorded(model, data, order, **options):
    """Prune; return the number of forwards of each layer and the order of pruning."""
    calls, names = {}, []
    hooks = [
        m.register_forward_hook(lambda m, a, o, n=n: calls.__setitem__(n, calls.get(n, 0) + 1))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    prune_model(
        model,
        data,
        score="wanda",
        calibration_order=order,
        hooks=[Names(names)],
        **options,
    )
    for hook in hooks:
        hook.remove()
    return calls, names


@pytest.mark.parametrize(("order", "forwards"), [("layer", 1), ("block", 2), ("dense", 1)])
def test_number_of_forwards(order, forwards):
    data = batches(count=3)
    calls, names = recorded(build("llama"), data, order)
    layers = [n for n in calls if "lm_head" not in n and "layers.1.mlp.down" not in n]
    assert {calls[n] for n in layers if "layers.0" in n} == {forwards * len(data)}
    # the output projection is not run: no layer follows the last wait point
    assert ("lm_head" in calls) == (order == "dense")
    assert len(names) == 14


def prune_sequentially(model, data):
    """Layer-sequential calibration written out for a chain of layers."""
    inputs = data
    for module in model:
        if isinstance(module, nn.Linear):
            norm = torch.cat(inputs).double().square().mean(0).sqrt().float()
            score = module.weight.detach().abs() * norm
            pruned = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
            module.weight.data.scatter_(1, pruned, 0)
        inputs = [module(x) for x in inputs]


def test_layer_order_sees_inputs_from_pruned_layers():
    data = [torch.randn(20, 16) for _ in range(3)]
    ours, reference = mlp(), mlp()
    prune_model(ours, data, score="wanda")
    with torch.no_grad():
        prune_sequentially(reference, data)
    assert torch.equal(ours[0].weight, reference[0].weight)
    assert torch.equal(ours[2].weight, reference[2].weight)


def test_dense_order_sees_the_dense_model():
    data = [torch.randn(20, 16) for _ in range(3)]
    ours, dense = mlp(), mlp()
    prune_model(ours, data, score="wanda", calibration_order="dense")
    hidden = dense[:2](torch.cat(data)).double().square().mean(0).sqrt().float()
    score = dense[2].weight.detach().abs() * hidden
    kept = torch.ones_like(score, dtype=torch.bool)
    kept.scatter_(1, score.argsort(dim=1, stable=True)[:, :12], False)
    assert torch.equal(ours[2].weight != 0, kept)


@pytest.mark.parametrize("order", ORDERS)
def test_masks_do_not_depend_on_batching(order):
    data = batches(count=6, size=1)
    joined = [{"input_ids": torch.cat([b["input_ids"] for b in data[i::2]])} for i in range(2)]
    one = prune_model(build("llama"), data, calibration_order=order).masks
    other = prune_model(build("llama"), joined, calibration_order=order).masks
    apart = sum(int((one[n] != other[n]).sum()) for n in one)
    assert apart <= sum(m.numel() for m in one.values()) / 10_000


class Experts(nn.Module):
    """Tokens go to one of two experts; a third is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        y = torch.zeros_like(x)
        for i in (0, 1):
            chosen = (x[:, 0] > 0) == bool(i)
            if chosen.any():
                y[chosen] = self.experts[i](x[chosen])
        return self.out(y)


@pytest.mark.parametrize("order", ORDERS)
def test_experts_that_some_batches_do_not_reach(order):
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(30, 8)
    data = [x[x[:, 0] > 0], x[x[:, 0] <= 0], x]
    with pytest.warns(PruningWarning, match="no calibration batch reached these layers.*experts.2"):
        result = prune_model(model, data, score="wanda", calibration_order=order)
    assert result.unreached == ["experts.2"]
    assert {r.name: r.tokens for r in result.layers} == {
        "experts.0": 2 * int((x[:, 0] <= 0).sum()),
        "experts.1": 2 * int((x[:, 0] > 0).sum()),
        "out": 60,
    }
    assert (model.experts[2].weight != 0).all()


class Looped(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.layer(x).relu())


def test_layer_called_twice_is_reported():
    with pytest.warns(PruningWarning, match="called again after they had been pruned.*: layer"):
        result = prune_model(Looped(), [torch.randn(5, 8)] * 2)
    assert result.layers[0].tokens == 10


def test_dense_order_measures_a_layer_called_twice_twice():
    assert (
        prune_model(Looped(), [torch.randn(5, 8)] * 2, calibration_order="dense").layers[0].tokens
        == 20
    )


class Failing(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.first, self.second, self.at = nn.Linear(8, 8), nn.Linear(8, 8), at
        # attributes of a module belong to the batch that assigns them
        self.seen = SimpleNamespace(calls=0, left=0)

    def forward(self, x):
        try:
            if self.at == "start":
                self.seen.calls += 1
                if self.seen.calls == 3:
                    raise RuntimeError("boom")
            x = self.first(x)
            if self.at == "middle":
                raise RuntimeError("boom")
            return self.second(x)
        finally:
            self.seen.left += 1


def test_batch_that_raises_before_anything_is_pruned():
    model = Failing("start")
    dense = model.first.weight.clone()
    with pytest.raises(RuntimeError, match="boom") as error:
        prune_model(model, [torch.randn(4, 8)] * 4)
    assert not isinstance(error.value, PruningError)
    assert torch.equal(model.first.weight, dense)
    assert model.seen.left == 3, "the two suspended batches have left the model"
    assert not model.first._forward_pre_hooks


def test_batch_that_raises_after_a_layer_was_pruned():
    model = Failing("middle").train()
    with pytest.raises(PruningError, match=r"after 1 of 2 layers: boom.*load it again"):
        prune_model(model, [torch.randn(4, 8)] * 4)
    assert model.seen.left == 4
    assert not model.first._forward_pre_hooks
    assert not model.second._forward_pre_hooks
    assert model.training
    assert model.second.training


class Casting(nn.Module):
    """Enables autocast in its forward, which must still be enabled after each wait."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
                assert x.dtype == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
        return x


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_inside_the_model(order):
    model = Casting()
    prune_model(model, [torch.randn(4, 8)] * 3, calibration_order=order)
    assert not torch.is_autocast_enabled("cpu")
    # no stale half-precision copy of dense weights is left behind
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse = nn.functional.linear(torch.eye(8), model.layers[0].weight).T
    assert (sparse == 0).sum() == 32


def test_context_variables_reach_the_model():
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []

    class Reading(nn.Linear):
        def forward(self, x):
            seen.append(variable.get())
            return super().forward(x)

    variable.set("set")
    prune_model(nn.Sequential(Reading(8, 8), nn.Linear(8, 8)), [torch.randn(4, 8)] * 2)
    assert seen == ["set", "set"]


@pytest.mark.parametrize("order", ORDERS)
def test_padding_does_not_count(order):
    short = batches(count=2, size=1, length=8)
    padded = []
    for batch in short:
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 5))
        mask = torch.nn.functional.pad(torch.ones(1, 8, dtype=torch.long), (0, 5))
        padded.append({"input_ids": ids, "attention_mask": mask})
    plain = prune_model(build("llama"), short, calibration_order=order)
    result = prune_model(build("llama"), padded, calibration_order=order)
    assert {r.tokens for r in result.layers} == {16}
    apart = sum(int((plain.masks[n] != result.masks[n]).sum()) for n in plain.masks)
    assert apart <= sum(m.numel() for m in plain.masks.values()) / 10_000


def test_works_inside_another_greenlet():
    result = []
    runner = greenlet.greenlet(
        lambda: result.append(prune_model(mlp(), [torch.randn(4, 16)] * 2).sparsity)
    )
    runner.switch()
    assert result == [0.5]


def test_batch_that_reaches_no_layer():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) if len(x) > 2 else x

    result = prune_model(Skipping(), [torch.randn(1, 8), torch.randn(4, 8)])
    assert result.layers[0].tokens == 4


@pytest.mark.parametrize(
    ("order", "sizes"), [("layer", [1] * 14), ("block", [7, 7]), ("dense", [14])]
)
def test_layers_are_pruned_in_model_order(order, sizes):
    model, data = build("llama"), batches(count=2)
    layers, groups = prunable_layers(model), []
    calibration = Calibration(model, data, lambda m, b: m(**b), WeightPlacement(model))
    recorder = Recorder(["input"], layers)

    def prune(group):
        groups.append([layer.name for layer in group])

    with torch.no_grad():
        SuspendedForward(calibration, layers, recorder, prune, order).run()
    assert [len(group) for group in groups] == sizes
    assert [name for group in groups for name in group] == [layer.name for layer in layers]


@pytest.mark.parametrize("order", ORDERS)
def test_default_dtype_that_a_forward_sets_and_restores(order):
    """As Lightning's half and double precision do."""

    def forward(model, batch):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return model(batch)
        finally:
            torch.set_default_dtype(before)

    prune_model(mlp(), [torch.randn(4, 16)] * 3, forward=forward, calibration_order=order)
    assert torch.get_default_dtype() == torch.float32


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x += self.first(x)
        return x + self.second(x)


class Residual(WritesToItsInput):
    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


def test_blocks_that_write_to_their_input():
    masks = []
    for kind in (WritesToItsInput, Residual):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(kind(), kind()))
        data = [torch.randn(6, 8) for _ in range(3)]
        masks.append(prune_model(model, data, calibration_order="block").masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


@pytest.mark.parametrize("order", ORDERS)
def test_expert_that_is_called_with_no_tokens_is_not_reached(order):
    class Calling(Experts):
        def forward(self, x):
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                chosen = (x[:, 0] > 0) == bool(i) if i < 2 else torch.zeros(len(x)).bool()
                y[chosen] = expert(x[chosen])
            return self.out(y)

    with pytest.warns(PruningWarning, match=r"experts.2"):
        result = prune_model(Calling(), [torch.randn(30, 8)], calibration_order=order)
    assert result.unreached == ["experts.2"]


def test_padding_does_not_count_where_a_model_flattens_its_tokens():
    batch = batches("opt", count=1, size=2, length=8)[0]
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 4:] = 0
    result = prune_model(build("opt"), [{**batch, "attention_mask": mask}])
    assert {report.tokens for report in result.layers} == {12}


def test_statistics_are_in_float32_under_autocast():
    from symprune_lightning.functional.refiners import ExactSwap

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    x = torch.randn(200, 16)
    plain, cast = (
        prune_model(mlp(), [x], refine=ExactSwap(), **options)
        for options in ({}, {"forward": forward})
    )
    assert plain.layers[0].error_refined == pytest.approx(cast.layers[0].error_refined, rel=1e-6)


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, [-2, 1]])
def test_a_model_that_collects_hidden_states_of_its_blocks(feature_layer):
    """The measuring call of a block does not run the hooks that collect them."""
    text = {**DECODER, "model_type": "llama"}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
    }
    config = tf.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=60,
        vision_feature_layer=feature_layer,
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((2, 16), 60), torch.randint(3, 50, (2, 8))], 1)
    data = [{"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)]
    seen = []
    projection = model.model.multi_modal_projector.linear_1
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    only = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)  # blocks after the features
        prune_model(model, data, score="wanda", calibration_order="block", only=only)
    during, seen[:] = seen[:3], []
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(during, seen, strict=True))


def test_a_cache_in_the_arguments_of_a_block_is_not_filled_twice():
    config = tf.XLMConfig(
        vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, causal=True, max_vocab=-1
    )
    torch.manual_seed(0)
    model = tf.XLMWithLMHeadModel(config).eval()
    dense = copy.deepcopy(model)
    result = prune_model(model, batches(), score="wanda", calibration_order="block")
    assert result.is_applied_to(model)
    assert len(result.layers) == len(prune_model(dense, batches(), score="wanda").layers)


def test_attention_of_torch():
    """Its projections are no calls of their own."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    dense = copy.deepcopy(model)
    result = prune_model(model, [x], score="wanda")
    assert result.coverage == 1
    assert result.unreached == []
    assert {name for name in result.masks if "attn" in name} == {
        *(f"self_attn.in_proj_weight.{i}" for i in range(3)),
        "self_attn.out_proj",
    }
    score = dense.self_attn.in_proj_weight.abs() * x.square().sum((0, 1)).sqrt()
    kept = torch.ones_like(score, dtype=torch.bool)
    kept.scatter_(1, score.argsort(dim=1, stable=True)[:, :8], value=False)
    parts = [result.masks[f"self_attn.in_proj_weight.{i}"] for i in range(3)]
    assert torch.equal(torch.cat(parts), kept)


class Shared(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu() * torch.arange(16))


def test_a_weight_of_two_modules_is_measured_at_both():
    data = [torch.randn(64, 16)]
    result = prune_model(Shared(), data, score="wanda", calibration_order="dense")
    assert {report.name: report.tokens for report in result.layers} == {"first": 128}
    with pytest.warns(PruningWarning, match="called again after they had been pruned.*first"):
        prune_model(Shared(), data, score="wanda")


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_weight_of_two_modules_is_dense_if_one_is_ignored(name):
    with pytest.raises(ValueError, match="nothing to prune"):
        prune_model(Shared(), [torch.randn(64, 16)], score="wanda", ignore=[name])
