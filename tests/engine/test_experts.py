"""Mixtures of experts: every method, and every way to run it, with equal masks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    MaskedFinetuning,
    PruneResult,
    PruningError,
    PruningHooks,
    PruningWarning,
    StreamedCheckpoint,
    SymPrune,
    Trainer,
    export_model,
    load_masks,
    prune_model,
)
from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.cli.verify import verify
from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.layers.find import all_layers, find_layers
from symprune_lightning.engine.layers.select import prunable_layers
from tests.groups import run_group
from tests.models import MIXTURES, batches, build

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"score": "wanda"},
    "stochria-block": {"score": "stochria", "calibration_order": "block"},
    "ria-dense": {"score": "ria", "calibration_order": "dense"},
    "r2dsnot": {"score": "ria", "refine": "r2dsnot"},
    "exactswap-2:4": {"score": "ria", "refine": "exactswap", "pattern": "2:4"},
    "maskedcg": {"score": "wanda", "update": "maskedcg"},
    "sparsegpt": {"solver": "sparsegpt"},
    "magnitude": {"score": "magnitude", "group": "layer"},
    "owl": {"score": "wanda", "allocation": "owl"},
}
GRADIENT: dict[str, Any] = {"score": "gradientwanda", "group": "layer", "allocation": "sensitivity"}
ALL: dict[str, Any] = {"score": "wanda", "experts": "all"}
RECONSTRUCTED: dict[str, Any] = {"calibration_order": "block", "reconstruct": True}
UNIFORM = [name for name in MIXTURES if name != "llama4"]


def prune(model, *, data=None, **options: Any) -> PruneResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)  # experts with few tokens, or none
        data = batches(count=4, length=24) if data is None else data
        return prune_model(model, data, **options)


def masks_of(result: PruneResult) -> dict[str, torch.Tensor]:
    return dict(result.masks.items())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not wrong


@pytest.mark.parametrize("name", MIXTURES)
def test_names_and_coverage(name):
    model = build(name)
    dense = copy.deepcopy(model)
    result = prune(model, score="wanda")
    experts = [report for report in result.layers if ".experts." in report.name]
    blocks = sum("experts" in key for key in model.state_dict() if key.endswith("gate_up_proj"))
    assert len(experts) == 2 * 4 * blocks  # two matrices of four experts
    assert experts[3].name.endswith("experts.gate_up_proj.3")
    assert result.coverage > 0.97
    assert not [weight for weight in result.left_dense if "experts" in weight.name]
    before = {layer.name: layer for layer in all_layers(dense)}
    for layer in find_layers(model, result.masks):
        mask = result.masks[layer.name]
        assert ((~mask).sum(1) == mask.shape[1] // 2).all()
        assert torch.equal(layer.matrix(), before[layer.name].matrix() * mask)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_model_is_as_before(name):
    """No stand-in stays, the experts implementation is restored, outputs are those of the model."""
    model = build(name)
    model.config._experts_implementation = "eager"
    attributes = {module: set(vars(module)) for module in model.modules()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    prune(model, score="wanda", experts="all" if name in UNIFORM else "routed")
    assert {module: set(vars(module)) for module in model.modules()} == attributes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.config._experts_implementation == "eager"
    assert type(model.state_dict()[_packed(model)]) is torch.Tensor


def _packed(model) -> str:
    return next(key for key, p in model.named_parameters() if p.dim() == 3)


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_dense(name):
    model = build(name)
    routers = [layer.name for layer in all_layers(model) if "router" in layer.name]
    assert not set(routers) & {layer.name for layer in prunable_layers(model)}
    if routers:  # a Linear layer in Llama 4 only
        assert prunable_layers(model, only=routers)[0].name == routers[0]
        result = prune(model, score="wanda")
        assert {w.reason for w in result.left_dense if "router" in w.name} == {"router"}


@pytest.mark.parametrize("name", MIXTURES)
def test_export_is_loaded_bit_for_bit_and_verified(name, tmp_path):
    model = build(name)
    prune(model, score="wanda")
    path = export_model(model, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert not [check for check in verify(str(path)) if check.passed is False]
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    manifest = read_manifest(path)
    masks = load_masks(path)
    for layer, tensors in manifest.get("tensors", {}).items():
        zeros = sum(int((stored[tensor] == 0).sum()) for tensor in tensors)
        assert zeros == int((~masks[layer]).sum()), layer
    if name in ("mixtral", "qwen3_moe", "deepseek_v3"):
        assert len(manifest["tensors"]) == sum(".experts." in layer for layer in masks)


class StopAfter(PruningHooks):
    """Stops a run after some layers."""

    def __init__(self, count: int) -> None:
        self.remaining = count

    def on_layer_pruned(self, report, mask):
        self.remaining -= 1
        if not self.remaining:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_has_equal_masks(method, name, tmp_path):
    options = METHODS[method]
    expected = prune(build(name), **options)
    stop = StopAfter(len(expected.layers) - 2)
    with pytest.raises(PruningError, match="stopped"):
        prune(build(name), journal=tmp_path, hooks=[stop], **options)
    again = build(name)
    result = prune(again, journal=tmp_path, **options)
    assert_equal(masks_of(result), masks_of(expected))
    assert result.is_applied_to(again)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_streamed_run_has_equal_masks_and_weights(name, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    for method, options in METHODS.items():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        masks = masks_of(prune(expected, **options))
        output = tmp_path / method.replace(":", "")
        with StreamedCheckpoint(tmp_path / "dense", output) as checkpoint:
            result = prune(checkpoint.model, placement=checkpoint, **options)
            checkpoint.save({"sparsity": result.sparsity})
        assert_equal(masks_of(result), masks)
        loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
        for key, value in expected.state_dict().items():
            assert torch.equal(loaded[key], value), (method, key)


STRATEGIES = {
    "ddp": list(MIXTURES),
    "fsdp2": list(MIXTURES),
    "tensor": ["mixtral", "qwen3_moe"],  # attention is split, experts are replicated
}


def distribute(model: nn.Module, strategy: str, size: int) -> Communicator:
    """Distribute a model, and return the communicator of its pruning."""
    mesh = init_device_mesh("cpu", (size,))
    if strategy == "tensor":
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
        plan |= {"self_attn.o_proj": RowwiseParallel()}
        for block in model.model.layers:
            parallelize_module(block, mesh, plan)
        return Communicator.from_default_group(0, 1)
    if strategy == "fsdp2":
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return Communicator.from_default_group()


def prune_on_ranks(rank: int, size: int, folder: Path, strategy: str) -> None:
    for name in STRATEGIES[strategy]:
        for method, options in METHODS.items():
            model = build(name)
            communicator = distribute(model, strategy, size)
            data = list(communicator.shard(batches(count=4, length=24)))
            result = prune(model, data=data, communicator=communicator, **options)
            assert result.is_applied_to(model), (name, method)
            torch.save(masks_of(result), folder / f"{name}-{method}-{rank}.pt")
    dist.barrier()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_have_equal_masks(strategy, tmp_path):
    run_group(prune_on_ranks, 2, tmp_path, strategy)
    for name in STRATEGIES[strategy]:
        for method, options in METHODS.items():
            expected = masks_of(prune(build(name), **options))
            for rank in range(2):
                found = torch.load(tmp_path / f"{name}-{method}-{rank}.pt")
                if strategy != "tensor":
                    assert_equal(found, expected)
                    continue
                # partial sums of attention are added in another order
                wrong = sum(int((found[k] != mask).sum()) for k, mask in expected.items())
                assert wrong <= 1e-3 * sum(mask.numel() for mask in expected.values()), method


@pytest.mark.parametrize("options", [GRADIENT, RECONSTRUCTED], ids=["gradient", "reconstruct"])
@pytest.mark.parametrize("name", MIXTURES)
def test_gradients(name, options):
    model = build(name)
    result = prune(model, **options)
    assert result.is_applied_to(model)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(block.error_reconstructed <= block.error for block in result.blocks)
    assert len(result.blocks) == (2 if options is RECONSTRUCTED else 0)


class Counts(nn.Module):
    """Experts of transformers that receive the router indices as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = build("mixtral").model.layers[0].mlp.experts

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, torch.ones(index.shape))


def routed(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and indices that send this many tokens to each expert."""
    index = torch.cat([torch.full((n, 1), i) for i, n in enumerate(counts)])
    torch.manual_seed(len(counts))
    return torch.randn(len(index), 32), index[torch.randperm(len(index))]


def test_every_expert_sees_its_tokens():
    result = prune_model(Counts(), [routed([5, 7, 9, 4]), routed([1, 0, 3, 8])], score="wanda")
    tokens = {report.name: report.tokens for report in result.layers}
    for name in ("gate_up_proj", "down_proj"):
        assert [tokens[f"experts.{name}.{i}"] for i in range(4)] == [6, 7, 12, 12]


def test_experts_without_tokens_are_left_dense_and_named():
    model = Counts()
    with pytest.warns(PruningWarning, match=r"still dense: experts.gate_up_proj.1, experts.down"):
        result = prune_model(model, [routed([5, 0, 9, 4])], score="wanda")
    assert result.unreached == ["experts.gate_up_proj.1", "experts.down_proj.1"]
    assert (model.experts.down_proj[1] != 0).all()
    assert result.coverage == pytest.approx(0.75)
    reasons = {w.name: (w.num_weights, w.reason) for w in result.left_dense}
    expected = (32 * 64, "not reached by any calibration batch")
    assert reasons["experts.down_proj"] == expected


@pytest.mark.parametrize("order", ["layer", "dense"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_without_tokens_are_pruned_by_magnitude_on_request(order, method, tmp_path):
    options = {"solver": method} if method == "sparsegpt" else {"score": method}
    model = Counts()
    dense = copy.deepcopy(model)
    for _ in range(2):  # the second run restores the layers from the journal
        with pytest.warns(PruningWarning, match="pruned by magnitude: experts.gate_up_proj.1"):
            result = prune_model(
                copy.deepcopy(dense) if _ else model,
                [routed([5, 0, 9, 4])],
                calibration_order=order,
                unreached="magnitude",
                journal=tmp_path,
                **options,
            )
    assert result.pruned_by_magnitude == ["experts.gate_up_proj.1", "experts.down_proj.1"]
    assert result.coverage == 1
    assert result.is_applied_to(model)
    prune_model(dense, [], score="magnitude")
    assert torch.equal(model.experts.down_proj[1], dense.experts.down_proj[1])


def test_few_tokens_for_a_gram_matrix_are_warned_about():
    with pytest.warns(PruningWarning, match=r"fewer calibration tokens than they have inputs.*j.0"):
        prune_model(Counts(), [routed([5, 80, 90, 70])], score="wanda", refine="exactswap")


@pytest.mark.parametrize("order", ["layer", "block", "dense"])
def test_all_tokens(order):
    """Every expert is measured on all tokens, and computes those that are routed to it."""
    model = Counts()
    blocks = nn.ModuleList([model])
    x, index = routed([5, 0, 9, 4])
    expected = model(x, index)

    def forward(module: nn.Module, batch: Any) -> torch.Tensor:
        return module[0](*batch)

    result = prune_model(
        blocks,
        [(x, index)],
        score="wanda",
        experts="all",
        calibration_order=order,
        forward=forward,
        only=["re:.*gate_up_proj.*"],
    )
    assert {report.tokens for report in result.layers} == {18}
    masks = masks_of(result)
    norm = x.square().sum(0)
    for i in range(4):
        weight = build("mixtral").model.layers[0].mlp.experts.gate_up_proj[i]
        order_of = (weight.abs() * norm.sqrt()).argsort(dim=1, stable=True)
        mask = torch.ones_like(weight, dtype=torch.bool).scatter_(1, order_of[:, :16], value=False)
        assert torch.equal(masks[f"0.experts.gate_up_proj.{i}"], mask)
    with torch.no_grad():
        assert not torch.equal(model(x, index), expected)


def test_all_tokens_needs_the_uniform_class():
    with pytest.raises(ValueError, match="experts='all' requires an experts module"):
        prune(build("llama4"), experts="all")


def test_padding_is_not_measured():
    """Masks are those of the batches without their padding."""
    tokens = batches(count=3, length=24)
    padded = []
    for batch in tokens:
        ids = torch.cat([batch["input_ids"], torch.full((2, 8), 5)], 1)
        mask = torch.cat([torch.ones(2, 24), torch.zeros(2, 8)], 1).long()
        padded.append({"input_ids": ids, "attention_mask": mask})
    for name in MIXTURES:
        expected = prune(build(name), data=tokens, score="wanda")
        result = prune(build(name), data=padded, score="wanda")
        counts = [report.tokens for report in expected.layers]
        assert [report.tokens for report in result.layers] == counts, name


def test_masked_finetuning_revives_no_weight(tmp_path):
    module = CausalLMModule(build("qwen3_moe"), learning_rate=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[SymPrune("wanda", when="fit_start"), MaskedFinetuning()],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        max_steps=20,
    )
    rows = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(2)).tolist()
    data = CalibrationDataModule(
        rows, sequences=8, sequence_length=16, training_sequences=8, evaluation_sequences=8
    )
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        trainer.fit(module, datamodule=data)
    masks = find_finetuning_masks(trainer)
    assert any("experts" in name for name in masks)
    for layer in find_layers(module.model, masks):
        assert not layer.matrix()[~masks[layer.name]].any()
        assert not torch.equal(layer.matrix(), before_of(layer, before))


def find_finetuning_masks(trainer: Any) -> Any:
    return next(c for c in trainer.callbacks if isinstance(c, MaskedFinetuning)).masks


def before_of(layer: Any, before: dict[str, torch.Tensor]) -> torch.Tensor:
    name = (
        layer.name.removesuffix(f".{layer.name.split('.')[-1]}")
        if layer.is_routed
        else (f"{layer.name}.weight")
    )
    return layer.view(before[name])


def test_an_expert_that_only_the_gradients_miss():
    """It is pruned as by Wanda: all its outputs count the same."""

    def forward(module: nn.Module, batch: Any) -> torch.Tensor:
        return module(*batch)

    data = [routed([5, 0, 9, 4]), routed([2, 8, 3, 4])]
    options: dict[str, Any] = {"group": "layer", "forward": forward}
    with pytest.warns(PruningWarning, match="no gradient was measured.*: experts.gate_up_proj.1"):
        result = prune_model(
            Counts(),
            data,
            score="gradientwanda",
            gradient_batches=1,
            loss=lambda module, batch: module(*batch).square().sum(),
            **options,
        )
    expected = prune_model(Counts(), data, score="wanda", **options)
    name = "experts.gate_up_proj.1"
    assert torch.equal(result.masks[name], expected.masks[name])
    assert not torch.equal(result.masks["experts.gate_up_proj.0"], expected.masks[name])


def test_expert_parallelism_is_refused():
    model = Counts()
    model.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="ranks hold different experts"):
        prune_model(model, [routed([5, 6, 9, 4])], score="wanda")


@pytest.mark.parametrize("order", ["layer", "dense"])
def test_a_resumed_run_names_each_layer_pruned_by_magnitude_once(order, tmp_path):
    blocks = nn.ModuleList([Counts(), Counts()])
    x, index = routed([5, 0, 9, 4])

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        return model[1](model[0](batch, index), index)

    names = [
        prune(
            copy.deepcopy(blocks),
            data=[x],
            forward=forward,
            score="wanda",
            calibration_order=order,
            unreached="magnitude",
            journal=tmp_path,
        ).pruned_by_magnitude
        for _ in range(2)
    ]
    assert sorted(names[1]) == sorted(names[0])
    assert len(names[0]) == 4
