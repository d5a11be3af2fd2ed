from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoModelForCausalLM

from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.layers.select import prunable_layers
from symprune_lightning.engine.placement import WeightPlacement
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.engine.sensitivity import measure_sensitivity
from symprune_lightning.errors import PruningError, PruningWarning
from symprune_lightning.functional.allocation import OWL
from symprune_lightning.functional.patterns import NM, Unstructured
from symprune_lightning.functional.reconstruction import BlockReconstruction
from symprune_lightning.functional.refiners import DSnoT, ExactSwap, R2DSnoT
from symprune_lightning.functional.registry import leaves, lookup
from symprune_lightning.functional.scores import RIA, Score, Wanda
from symprune_lightning.functional.solvers import ADMM
from symprune_lightning.functional.statistics import Moments, Statistics
from symprune_lightning.functional.update import MaskedCG
from tests.models import LANGUAGE, batches, build, llama, mlp

GOLDEN = Path(__file__).parent.parent / "golden"


def golden_dsnot(**options):
    return DSnoT(threshold=0.1 / 128, reference=True, **options)


GOLDEN_RUNS = {
    "magnitude-50": {"score": "magnitude", "group": "layer"},
    "wanda-50": {"score": "wanda"},
    "ria-50": {"score": "ria"},
    "ria-alpha1-60": {"score": RIA(alpha=1.0), "sparsity": 0.6},
    "wanda-2of4": {"score": "wanda", "pattern": "2:4"},
    "ria-2of4": {"score": "ria", "pattern": "2:4"},
    "wanda-4of8": {"score": "wanda", "pattern": "4:8"},
    "dsnot-wanda-50": {"score": "wanda", "refine": golden_dsnot()},
    "dsnot-magnitude-50": {"score": "magnitude", "refine": golden_dsnot()},
    "dsnot-wanda-50-attention-only": {
        "score": "wanda",
        "refine": {"re:.*self_attn.*": golden_dsnot()},
    },
    "dsnot-wanda-2of4": {"score": "wanda", "pattern": "2:4", "refine": golden_dsnot()},
    "dsnot-wanda-60-same-sign": {
        "score": "wanda",
        "sparsity": 0.6,
        "refine": golden_dsnot(same_sign=True),
    },
}


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_golden_masks(name):
    """The masks of the reference implementations, at most 1 weight in 10,000 apart."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN)
    sequences = load_file(GOLDEN / "calibration.safetensors")["input_ids"]
    data = [{"input_ids": ids[None]} for ids in sequences]
    masks = prune_model(model, data, calibration_order="block", **GOLDEN_RUNS[name]).masks
    reference = load_file(GOLDEN / f"{name}.safetensors")
    assert set(masks) == set(reference)
    for layer, packed in reference.items():
        kept = np.unpackbits(packed.numpy(), axis=1)[:, : masks[layer].shape[1]].astype(bool)
        apart = (masks[layer].numpy() != kept).sum()
        assert apart <= kept.size / 10_000, layer


@pytest.mark.parametrize("order", ["layer", "block", "dense"])
@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])
def test_architectures_reach_exactly_the_requested_sparsity(name, order):
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = prune_model(model, batches(name), refine="r2dsnot", calibration_order=order)
    assert not result.unreached
    assert len(result.masks) >= 8
    for layer, mask in result.masks.items():
        module = model.get_submodule(layer)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all(), layer
        assert torch.equal(weight != 0, mask)
        assert (~mask).sum() == (mask.numel() // 2)
    pruned = {f"{layer}.weight" for layer in result.masks}
    for parameter, value in model.named_parameters():
        if parameter not in pruned:
            assert torch.equal(value, before[parameter]), f"{parameter} has changed"
        else:
            kept = value != 0
            assert torch.equal(value[kept], before[parameter][kept]), "kept weights are as before"


@pytest.mark.parametrize("group", ["output", "input", "layer"])
@pytest.mark.parametrize(
    "score",
    [
        score.__name__
        for score in leaves(Score)
        if score.__module__.startswith("symprune_lightning")
    ],
)
@pytest.mark.filterwarnings("ignore:.*differs only between rows")
def test_scores_and_groups_compose(score, group):
    model, data = mlp(), [torch.randn(9, 16)]
    dense = mlp()[0].weight.detach()
    result = prune_model(model, data, score=score, group=group, sparsity=0.25)
    assert result.sparsity == 0.25
    # in every group the kept scores are at least the pruned ones
    x = torch.cat(data)
    calibration = Calibration(mlp(), data, lambda m, b: m(b), WeightPlacement(mlp()))
    gradient = measure_sensitivity(prunable_layers(calibration.model), calibration)["0"]
    statistics = Statistics(
        "0",
        input=Moments.of(x),
        output=Moments.of(x @ dense.T),
        output_gradient=gradient.output_gradient,
    )
    scores = lookup(Score, score)(dense, statistics)
    budget = Unstructured(0.25, group)
    grouped, kept = budget.groups(scores), budget.groups(result.masks["0"])
    lowest_kept = grouped.masked_fill(~kept, torch.inf).amin(1)
    assert (grouped.masked_fill(kept, -torch.inf).amax(1) <= lowest_kept).all()
    assert [r.name for r in result.layers] == ["0", "2"]
    if group == "layer":  # of 384 and 192 weights, by the score of the weights themselves
        assert [r.num_zeros for r in result.layers] == [96, 48]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    model = mlp(dtype=dtype)
    data = [torch.randn(9, 16, dtype=dtype)]
    assert prune_model(model, data, refine=R2DSnoT()).sparsity == 0.5
    assert model[0].weight.dtype == dtype


def test_reports():
    data = [torch.randn(9, 16) + 1, torch.randn(7, 16) + 1]
    calls = []

    class Recording(PruningHooks):
        def on_pruning_start(self, layers):
            calls.append(layers)

        def on_layer_pruned(self, report, mask):
            calls.append(report)
            assert mask.sum() == report.num_weights - report.num_zeros

    result = prune_model(mlp(), data, refine="r2dsnot", hooks=[Recording()], sparsity=0.3)
    first, second = result.layers
    assert (first.name, first.shape, first.tokens) == ("0", (24, 16), 16)
    assert first.sparsity == 4 / 16, "floor(16 · 0.3) of each row"
    assert second.sparsity == 7 / 24
    assert 0 < first.error < 1
    assert first.swaps > 0
    assert first.error_refined != first.error
    assert first.seconds > 0
    assert calls == [["0", "2"], first, second]


def test_error_is_that_of_the_dense_weights():
    """Reported relative error against the output error measured with the very data."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 16)
    model, dense = nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 8))
    dense.load_state_dict(model.state_dict())
    report = prune_model(model, [x], score="wanda").layers[0]
    with torch.no_grad():
        lost = (x @ (dense[0].weight - model[0].weight).T).square().sum()
        relative = float(lost / (x @ dense[0].weight.T).square().sum())
    assert report.error == pytest.approx(relative, rel=0.02)
    assert report.error_refined == report.error


def test_magnitude_needs_no_data_and_runs_no_forward():
    class Untouchable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            raise AssertionError("not needed")

    result = prune_model(Untouchable(), [], score="magnitude")
    assert result.sparsity == 0.5
    assert result.layers[0].error is None


def test_zeros_stay_and_count():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1, :3] = 0
    zero = model[0].weight == 0
    result = prune_model(model, [torch.randn(9, 16)], refine="dsnot", sparsity=0.5)
    assert not result.masks["0"][zero].any()
    kept = result.masks["0"].sum(1)
    assert kept[0] == 0
    assert (kept[1:] == 8).all()


def test_mode_cache_and_gradients_are_restored():
    model = build("llama").train()
    model.model.layers[0].eval()
    prune_model(model, batches())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
    assert model.config.use_cache is True
    assert all(p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_training_works_after_pruning_in_inference_mode():
    model = build("llama")
    with torch.inference_mode():
        prune_model(model, batches(), refine="r2dsnot")
    batch = batches()[0]["input_ids"]
    model(input_ids=batch, labels=batch).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_batches_may_be_tuples_tensors_or_anything_with_a_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, y):
            return self.layer(x + y)

    x = torch.randn(4, 8)
    one = prune_model(mlp_of_two(Two), [(x, x)]).masks["layer"]
    two = prune_model(mlp_of_two(Two), [{"x": x, "y": x}]).masks["layer"]
    three = prune_model(mlp_of_two(Two), [x], forward=lambda m, b: m(b, b)).masks["layer"]
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def mlp_of_two(kind):
    torch.manual_seed(0)
    return kind()


def test_empty_calibration_set():
    model = mlp()
    dense = model[0].weight.clone()
    with pytest.raises(ValueError, match="calibration set is empty"):
        prune_model(model, [])
    assert torch.equal(model[0].weight, dense)


def test_forward_that_runs_another_model():
    with pytest.raises(ValueError, match="none of the 2 prunable layers, such as 0, was called"):
        prune_model(mlp(), [torch.randn(4, 16)], forward=lambda m, b: b)


def test_nan_activations_name_the_layer():
    x = torch.randn(4, 16)
    x[1, 5] = torch.nan
    model = mlp()
    dense = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"input of layer 0 holds NaN or infinite.*channel 5"):
        prune_model(model, [x])
    assert torch.equal(model[0].weight, dense)


def test_infinite_activations_after_a_layer_was_pruned():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    model[0].bias.data[3] = torch.inf
    with pytest.raises(PruningError, match=r"after 1 of 2 layers: the input of layer 1 holds NaN"):
        prune_model(model, [torch.randn(4, 16)])


def test_nan_weights_name_the_layer():
    model = mlp()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 0: some weights or scores are NaN"):
        prune_model(model, [torch.randn(4, 16)])


def test_pattern_that_does_not_divide_names_the_layer():
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match="layer 1: pattern 2:4 does not divide 6 inputs"):
        prune_model(model, [torch.randn(4, 16)], pattern="2:4")
    assert (model[0].weight != 0).all()


def test_refiner_that_would_break_the_budget():
    with pytest.raises(ValueError, match="refiners swap weights within rows, which breaks"):
        prune_model(mlp(), [torch.randn(4, 16)], refine="dsnot", group="input")


def test_refiners_chain():
    data = [torch.randn(40, 16)]
    chained = prune_model(mlp(), data, refine=["dsnot", ExactSwap()])
    exact = prune_model(mlp(), data, refine="exactswap")
    assert chained.layers[0].error_refined < chained.layers[0].error
    assert not torch.equal(chained.masks["0"], exact.masks["0"])


@pytest.mark.parametrize("refine", ["dsnot", "r2dsnot", "exactswap", R2DSnoT(guard="gram")])
def test_refiners_keep_the_groups_of_a_pattern(refine):
    result = prune_model(mlp(), [torch.randn(40, 16) + 1], refine=refine, pattern="2:4")
    assert result.layers[0].swaps > 0
    for mask in result.masks.values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_order": "lazy"}, "calibration_order is 'lazy'; choose one of"),
        ({"sparsity": 50}, "for fifty percent write 0.5"),
        ({"score": "wandb"}, "no Score is called 'wandb'"),
        ({"refine": "dsno"}, "no MaskRefiner is called 'dsno'"),
        ({"refine": {"re:.*attn": "dsnot"}}, "'re:.*attn' matches none of the 2 layers"),
        ({"ignore": ["lm_heat"]}, "'lm_heat' matches none"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        prune_model(mlp(), [torch.randn(4, 16)], **options)


def test_tensor_passed_as_batches():
    with pytest.raises(ValueError, match="batches is one Tensor; pass an iterable"):
        prune_model(mlp(), torch.randn(4, 16))


def test_a_model_that_is_sparse_already():
    model = build("llama")
    first = prune_model(model, batches(), score="wanda", sparsity=0.5)
    assert first.initial_sparsity == 0
    assert first.sparse_start == ""
    again = prune_model(model, batches(), score="wanda", sparsity=0.5)
    assert again.initial_sparsity == pytest.approx(first.sparsity)
    assert "50.0 % of the weights" in again.sparse_start
    assert "no further weight was pruned" in again.sparse_start
    more = prune_model(model, batches(), score="wanda", sparsity=0.75)
    assert [x.initial_sparsity for x in more.layers] == [x.sparsity for x in first.layers]
    assert "no further" not in more.sparse_start


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("group", ["output", "layer"])
def test_a_layer_of_zeros_is_left_alone(score, group):
    """Its mask would be all False, and keep it from ever being trained."""
    model = mlp()
    nn.init.zeros_(model[2].weight)
    with pytest.warns(PruningWarning, match="are all zero, and were left alone: 2"):
        result = prune_model(model, [torch.randn(4, 16)], score=score, group=group)
    assert result.all_zero == ["2"]
    assert "2" not in result.masks
    assert result.unreached == []
    assert result.sparsity == 0.5
    assert [(dense.name, dense.reason) for dense in result.left_dense] == [("2.weight", "all zero")]


def test_batches_of_another_type_are_refused():
    for data in ({"input": torch.randn(4, 16)}, "text"):
        with pytest.raises(ValueError, match="pass an iterable of batches, such as"):
            prune_model(mlp(), data)


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model is a str, which is no nn"):
        prune_model("gpt2", [torch.randn(4, 16)])


def test_batches_of_single_samples():
    assert prune_model(mlp(), list(torch.randn(4, 16))).layers[0].tokens == 4


def test_allocation_without_batches():
    with pytest.raises(ValueError, match="calibration set is empty"):
        prune_model(mlp(), [], allocation="owl")


def test_score_of_another_shape_is_refused():
    class Broadcast(Score):
        def __call__(self, weight, statistics):
            return weight.abs().mean(0, keepdim=True)

    model = mlp()
    with pytest.raises(ValueError, match=r"layer 0: Broadcast returned scores of shape \(1, 16\)"):
        prune_model(model, [torch.randn(4, 16)], score=Broadcast())
    assert (model[0].weight != 0).all()


class WholeBatch(torch.nn.Module):
    """A model whose forward takes a mapping, as those of sentence-transformers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, features, **options):
        assert not options
        return self.layer(features["x"])


def test_a_mapping_is_passed_whole_to_a_model_that_takes_none_of_its_keys():
    batches = [{"x": torch.randn(8, 4), "y": torch.zeros(8)}]
    assert prune_model(WholeBatch(), batches).sparsity == 0.5
    # a key that the model does not take is a mistake, if it takes another one
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        prune_model(
            torch.nn.Sequential(torch.nn.Linear(4, 4)), [{"input": batches[0]["x"], "y": 1}]
        )


def test_batches_with_labels_are_explained():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    batches = [(torch.randn(8, 4), torch.zeros(8))]
    message = r"does not take a batch of 2 values: .*such as forward=lambda model, batch"
    with pytest.raises(TypeError, match=message):
        prune_model(model, batches)
    result = prune_model(model, batches, forward=lambda model, batch: model(batch[0]))
    assert result.sparsity == 0.5


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ("a text", "str"),
        (3, "int"),
        (None, "NoneType"),
        (np.zeros((4, 16), dtype=np.float32), "ndarray"),
        (["a text", "another"], r"list\[str\]"),
    ],
)
def test_batches_without_tensors_are_explained(batch, kind):
    with pytest.raises(TypeError, match=f"batch has type {kind}: .*forward=lambda"):
        prune_model(mlp(), [batch])


def test_a_model_may_take_batches_without_tensors():
    class OfTexts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, texts):
            return self.layer(torch.tensor([[float(len(text)), 1.0] for text in texts]))

    assert prune_model(OfTexts(), [["a", "bcd"]], forward=lambda m, b: m(b)).sparsity == 0.5


def test_the_shapes_of_a_batch_on_which_the_model_fails_are_named():
    with pytest.raises(ValueError, match=r"layer 0 has 7 features, and its weight 16") as raised:
        prune_model(mlp(), [torch.randn(4, 16), torch.randn(4, 7)])
    assert any("(4, 7)" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batches_of_another_dtype_leave_the_model_unchanged(dtype):
    model = mlp()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"layer 0 is {dtype}, and its weight torch.float32"):
        prune_model(model, [torch.randn(4, 16, dtype=dtype)])
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert prune_model(model, [torch.randn(4, 16, dtype=torch.bfloat16)]).sparsity == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": Wanda}, r"Wanda is a class: pass an instance, Wanda\(\)"),
        ({"refine": ExactSwap}, "ExactSwap is a class"),
        ({"refine": [ExactSwap]}, "ExactSwap is a class"),
        ({"update": MaskedCG}, "MaskedCG is a class"),
        ({"solver": ADMM}, "ADMM is a class"),
        ({"allocation": OWL}, "OWL is a class"),
        ({"reconstruct": BlockReconstruction}, "BlockReconstruction is a class"),
        ({"pattern": NM}, "NM is a class"),
        ({"pattern": (2, 4)}, r"\(2, 4\) is a tuple, and no Pattern"),
        ({"score": None}, "None is a NoneType, and no Score"),
        ({"score": ExactSwap()}, "is a ExactSwap, and no Score"),
    ],
)
def test_neither_a_name_nor_an_instance(options, message):
    with pytest.raises(TypeError, match=message):
        prune_model(mlp(), [torch.randn(4, 16)], **options)


def test_a_group_that_a_pattern_contradicts():
    with pytest.raises(ValueError, match="group='layer' has no effect with NM"):
        prune_model(mlp(), [torch.randn(4, 16)], pattern="2:4", group="layer")


def test_a_lazy_layer():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: call the model once"):
        prune_model(model, [torch.randn(4, 16)])


def test_complex_weights():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="layer 0 holds complex numbers"):
        prune_model(model, [torch.randn(4, 4, dtype=torch.complex64)])


def test_an_output_projection_that_is_tied_is_not_dropped_in_silence():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"only= has lm_head, whose weight is that of model\."):
        prune_model(model, batches(), only=["lm_head", "re:.*_proj"])
    assert "lm_head" in prune_model(llama(), batches(), only=["lm_head", "re:.*_proj"]).masks


def test_buffers_of_an_ignored_layer_do_not_change():
    model = nn.Sequential(nn.Linear(16, 16), spectral_norm(nn.Linear(16, 16))).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = prune_model(model, [torch.randn(4, 16)], ignore=["1"])
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert [(w.name, w.reason) for w in result.left_dense] == [
        ("1.parametrizations.weight.original", "ignored")
    ]


def test_a_result_for_another_module():
    model = mlp()
    result = prune_model(model, [torch.randn(4, 16)])
    with pytest.raises(ValueError, match=r"it has a layer part\.0"):
        result.is_applied_to(nn.ModuleDict({"part": model}))


def test_results_are_short_in_a_notebook():
    result = prune_model(mlp(), [torch.randn(4, 16)], score="wanda")
    assert repr(result) == f"PruneResult({len(result.layers)} layers, sparsity 0.5000)"


def test_a_pattern_without_its_prefix_is_named():
    with pytest.raises(ValueError, match=r"matches none of the .* \(as a pattern: 're:\.\*2'\)"):
        prune_model(mlp(), [torch.randn(4, 16)], ignore=[".*2"])
