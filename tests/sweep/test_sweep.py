"""A chosen set of architectures; ``make sweep`` runs all of them."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from symprune_lightning import (
    LayerReport,
    PruneResult,
    PruningWarning,
    export_model,
    prune_model,
)
from symprune_lightning.cli.verify import verify
from symprune_lightning.engine.coverage import record_coverage
from symprune_lightning.engine.layers.exempt import ROUTER, exempt_layers
from symprune_lightning.engine.layers.find import all_layers, find_layers
from symprune_lightning.engine.layers.select import prunable_layers
from tests.sweep.reference import input_norms, plain, wanda_mask
from tests.sweep.tiny import TASKS, batches, build

CHOSEN = {
    "causal": (
        *("afmoe", "bert", "bloom", "codegen", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3"),
        *("ernie4_5", "falcon_mamba", "flex_olmo", "gemma3n_text", "gemma4_text@moe", "glm4_moe"),
        *("gpt2", "gpt_oss", "granitemoe", "jamba", "jetmoe", "llama", "llama4_text"),
        *("longcat_flash", "mamba2", "minimax", "mixtral", "nemotron_h", "olmoe", "opt", "phimoe"),
        *("qwen2_moe", "qwen3_5_text", "qwen3_moe", "qwen3_next", "rwkv", "xlm", "xlnet", "zaya"),
    ),
    "image-text": ("llava",),
    "seq2seq": ("t5", "bart", "switch_transformers"),
}
CHOSEN_PAIRS = {(task, name) for task, names in CHOSEN.items() for name in names}
RUNS_ALL = bool(os.environ.get("SYMPRUNE_SWEEP"))
NAMES = [
    (task, name)
    for task, names in CHOSEN.items()
    for name in ({**dict.fromkeys(names), **dict.fromkeys(TASKS[task][0])} if RUNS_ALL else names)
]
LOOPED = ("albert", "dory", "gemma3n_text", "hrm_text", "pegasus_x", "prophetnet", "t5gemma2")
"""Models that call a layer more than once in a forward."""

NOT_RELOADED = ("marian", "shieldgemma2")
"""Models of which transformers restores some weights of its own, dense or pruned."""

Pruned = tuple[PreTrainedModel, PreTrainedModel, PruneResult]


@pytest.fixture(scope="module", params=NAMES, ids="-".join)
def task_and_name(request):
    return request.param


@pytest.fixture(scope="module")
def pruned(task_and_name) -> Pruned:
    """The dense model, the pruned one and the result."""
    task, name = task_and_name
    try:
        dense = build(task, name)
        with torch.no_grad(), plain(dense):
            dense(**batches(task)[0])
    except Exception as error:
        if not RUNS_ALL:
            raise
        pytest.skip(f"no tiny model: {type(error).__name__} {error}"[:200])
    model = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        result = prune_model(model, batches(task), score="wanda", sparsity=0.5)
    return dense, model, result


def test_weights_are_zero_exactly_where_the_masks_prune(pruned):
    dense, model, result = pruned
    before = {layer.name: layer for layer in all_layers(dense)}
    changed = set()
    for layer in find_layers(model, result.masks):
        mask = result.masks[layer.name]
        assert ((~mask).sum(1) == mask.shape[1] // 2).all(), layer.name
        assert torch.equal(layer.matrix(), before[layer.name].matrix() * mask), layer.name
        changed.add(id(layer.parameter))
    weights = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        assert id(parameter) in changed or torch.equal(parameter, weights[name]), name


def test_masks_equal_those_of_an_independent_computation(pruned, task_and_name):
    """Every input of the pruned model is the one that was measured: what precedes is pruned."""
    dense, model, result = pruned
    task, name = task_and_name
    if name in LOOPED:
        pytest.skip("only the first call of each layer is measured")
    kinds = {"ConvolutionKind", "GroupedLinearKind"}  # tested with their kinds
    layers = [x for x in find_layers(model, result.masks) if type(x.kind).__name__ not in kinds]
    norms = input_norms(model, batches(task), layers)
    before = {layer.name: layer for layer in all_layers(dense)}
    wrong = total = 0
    for layer in layers:
        assert layer.name in norms.squares, layer.name
        arguments = norms.squares[layer.name], norms.tokens[layer.name]
        mask = wanda_mask(before[layer.name].matrix(), *arguments)
        wrong += int((mask != result.masks[layer.name]).sum())
        total += mask.numel()
    assert wrong <= 2 * (total > 1e6), f"{wrong} of {total}: more than a near-tie"


def test_coverage(pruned, task_and_name):
    """Layers hold almost all weights; what is left dense is named with a reason."""
    result, total = pruned[2], pruned[2].coverage_counts.total
    left = sum(weight.num_weights for weight in result.left_dense if weight.in_block)
    assert result.coverage == pytest.approx(1 - left / total)
    assert all(weight.reason for weight in result.left_dense)
    in_blocks = [weight for weight in result.left_dense if weight.in_block]
    without_layer = [w for w in in_blocks if w.reason.startswith(("parameter", "depth"))]
    assert sum(weight.num_weights for weight in without_layer) < 0.1 * total
    if task_and_name in CHOSEN_PAIRS:
        assert not [name for name in result.unreached if ".experts." in name]


@pytest.mark.skipif(not RUNS_ALL, reason="minutes; part of `make sweep`")
def test_coverage_at_full_size():
    """With the default configuration of each type, on the meta device."""
    covered, measured, low = 0, 0, {}
    for name in TASKS["causal"][0]:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())
            model.tie_weights()
            layers = prunable_layers(model, allow_meta=True)
        except Exception:
            continue
        reports = [
            LayerReport(x.name, tuple(x.shape), 0.5, 0.5, None, None, None, 0, 1, 0.0)
            for x in layers
        ]
        result = PruneResult(layers=reports)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PruningWarning)
            record_coverage(model, layers, result)
        measured += 1
        covered += result.coverage >= 0.99
        if result.coverage < 0.99:
            low[name] = round(result.coverage, 3), [w.name for w in result.left_dense[:3]]
    print(f"{covered} of {measured} types have a coverage of at least 0.99; others:", low)
    assert covered >= 170
    assert min(coverage for coverage, _ in low.values()) > 0.9


def test_routers_are_dense(pruned):
    _, model, result = pruned
    layers = all_layers(model)
    routers = {name for name, reason in exempt_layers(model, layers).items() if reason == ROUTER}
    assert not routers & set(result.masks)
    for layer in layers:
        last = layer.name.split(".")[-1]
        if last in ("router", "shared_expert_gate", "gate") and layer.shape[0] <= 8:
            assert layer.name in routers


def test_export_is_loaded_bit_for_bit_and_verified(pruned, task_and_name, tmp_path):
    model = pruned[1]
    if task_and_name[1] in NOT_RELOADED:
        pytest.skip("not reloaded by transformers as it was saved")
    path = export_model(model, tmp_path / "pruned")
    loaded = type(model).from_pretrained(path)
    state = loaded.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key
    assert not [check for check in verify(str(path)) if check.passed is False]
