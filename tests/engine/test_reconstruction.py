"""Reconstruction of real decoder blocks after pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from symprune_lightning import (
    BlockReconstruction,
    BlockReport,
    PruningError,
    PruningHooks,
    PruningWarning,
    prune_model,
)
from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS, Communicator
from symprune_lightning.engine.distributed.dtensor import full_tensor
from tests.engine.test_communicator import shard
from tests.engine.test_journal import StopAfter
from tests.groups import run_group
from tests.models import LANGUAGE, batches, build, llama

FAST = BlockReconstruction(epochs=2, learning_rate=1e-2)
OPTIONS: dict[str, Any] = {"score": "wanda", "sparsity": 0.6, "calibration_order": "block"}


def data(name: str = "llama", count: int = 8) -> list[dict[str, torch.Tensor]]:
    return batches(name, count=count, size=1, length=24)


def reconstruct(model: nn.Module, settings: BlockReconstruction = FAST, **options: Any) -> Any:
    name = options.pop("name", "llama")
    return prune_model(model, data(name), reconstruct=settings, **{**OPTIONS, **options})


def first_block_error(model: nn.Module, dense: nn.Module) -> float:
    """Mean over tokens of the relative squared error of Llama's first block, on the last batch."""
    calls: list[Any] = []
    block, wanted = model.model.layers[0], dense.model.layers[0]
    handle = wanted.register_forward_pre_hook(
        lambda _, *arguments: calls.append(arguments), with_kwargs=True
    )
    with torch.no_grad():
        dense(**data()[-1], use_cache=False)
        handle.remove()
        ((args, kwargs),) = calls
        y, target = block(*args, **kwargs), wanted(*args, **kwargs)
    return float(((y - target).square().sum(-1) / target.square().sum(-1)).mean())


@pytest.mark.parametrize("target", ["block", "model"])
@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])
def test_the_error_of_every_block_falls_and_zeros_stay(name, target):
    model = build(name)
    settings = BlockReconstruction(epochs=3, learning_rate=1e-2, target=target)
    result = reconstruct(model, settings, name=name)
    assert len(result.blocks) == 2
    for report in result.blocks:
        assert report.error_reconstructed == min(report.errors)
        assert report.error_reconstructed < report.error == report.errors[0]
        assert len(report.errors) == 4
        assert report.steps == 3 * 7
    assert result.is_applied_to(model)
    assert result.sparsity == pytest.approx(0.6, abs=0.02)
    assert all(module.weight.count_nonzero() > 0 for module in model.modules() if is_linear(module))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_the_first_block_has_the_same_error_as_computed_by_hand():
    dense, model = build("llama"), build("llama")
    result = reconstruct(model, BlockReconstruction(epochs=2, learning_rate=1e-2))
    masked = build("llama")
    prune_model(masked, data(), **OPTIONS)
    errors = result.blocks[0].errors
    assert errors[0] == pytest.approx(first_block_error(masked, dense), rel=1e-4)
    assert min(errors) == pytest.approx(first_block_error(model, dense), rel=1e-4)


def test_target_model_brings_later_blocks_closer_to_the_dense_model():
    dense = build("llama")

    def distance(target: Any) -> float:
        model = build("llama")
        settings = BlockReconstruction(epochs=20, learning_rate=1e-2, target=target)
        reconstruct(model, settings)
        with torch.no_grad():
            states, wanted = (
                torch.cat([m(**b, output_hidden_states=True).hidden_states[-1] for b in data()])
                for m in (model, dense)
            )
        return float((states - wanted).square().sum() / wanted.square().sum())

    assert distance("model") < distance("block")


def test_masks_of_the_first_block_and_all_other_parameters_are_unchanged():
    dense, model, masked = build("llama"), build("llama"), build("llama")
    result = reconstruct(model)
    expected = prune_model(masked, data(), **OPTIONS)
    for name, mask in expected.masks.items():
        if name.startswith("model.layers.0."):
            assert torch.equal(result.masks[name], mask)
    for name, parameter in dense.named_parameters():
        if "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_norms_and_biases_on_request(name):
    dense, model = build(name), build(name)
    settings = BlockReconstruction(epochs=2, learning_rate=1e-2, train_norms=True)
    result = reconstruct(model, settings, name=name)
    assert result.is_applied_to(model)
    changed = {
        key for key, value in dense.named_parameters() if (model.get_parameter(key) != value).any()
    }
    inside = {key for key in changed if ".layers." in key or ".h." in key}
    assert inside == changed
    vectors = {k for k, p in dense.named_parameters() if p.dim() == 1 and (".0." in k)}
    # the bias of k_proj has no effect on attention, so its gradient is rounding only
    assert {k for k in vectors if "k_proj.bias" not in k} <= changed


def test_excluded_layers_and_layers_outside_of_blocks():
    dense, model = build("llama"), build("llama")
    result = reconstruct(model, ignore=["lm_head", "re:.*down_proj"])
    assert len(result.blocks) == 2
    for block, before in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(block.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_methods_without_data():
    result = reconstruct(build("llama"), score="magnitude")
    assert all(block.error_reconstructed < block.error for block in result.blocks)


def test_float16_gradients_do_not_underflow():
    """Large activations and many tokens: the gradient of a mean over them is below 6e-8."""
    torch.manual_seed(0)
    model = llama(hidden_size=64, num_attention_heads=8).half().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000)  # hidden states as of a large model
    inputs = batches(count=4, size=1, length=128)
    result = prune_model(model, inputs, reconstruct=FAST, **OPTIONS)
    assert all(block.error_reconstructed < 0.99 * block.error for block in result.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = build("llama").to(dtype)
    result = reconstruct(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(block.error_reconstructed < block.error for block in result.blocks)
    assert result.is_applied_to(model)


def test_autocast():
    def forward(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    model = build("llama")
    result = reconstruct(model, forward=forward)
    assert all(block.error_reconstructed < block.error for block in result.blocks)
    assert all(p.grad is None for p in model.parameters())


def test_padding_does_not_count():
    """Rows that differ only in padded positions give the same weights."""

    def padded(filler: int) -> list[dict[str, torch.Tensor]]:
        rows = []
        for batch in data():
            ids = batch["input_ids"].clone()
            mask = torch.ones_like(ids)
            ids[:, 18:], mask[:, 18:] = filler, 0
            rows.append({"input_ids": ids, "attention_mask": mask})
        return rows

    first, second = build("llama"), build("llama")
    options = {**OPTIONS, "reconstruct": FAST}
    prune_model(first, padded(5), **options)
    prune_model(second, padded(6), **options)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["block", "model"])
def test_offloaded_hidden_states(tmp_path, target):
    settings = BlockReconstruction(epochs=1, learning_rate=1e-2, target=target)
    model, other = build("llama"), build("llama")
    reconstruct(model, settings)
    reconstruct(other, settings, offload=tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name
    assert not list(tmp_path.iterdir())


def test_hooks_see_blocks_and_epochs():
    seen: list[Any] = []

    class Watch(PruningHooks):
        def on_reconstruction_epoch(self, block: str, epoch: int, error: float) -> None:
            seen.append((block, epoch, error))

        def on_block_reconstructed(self, report: BlockReport) -> None:
            seen.append(report)

    result = reconstruct(build("llama"), hooks=[Watch()])
    expected: list[Any] = []
    for report in result.blocks:
        expected += [(report.name, epoch, error) for epoch, error in enumerate(report.errors)]
        expected.append(report)
    assert seen == expected
    assert [report.name for report in result.blocks] == ["model.layers.0", "model.layers.1"]


def test_experts_without_tokens():
    """Most experts get no token in a batch, and some get none at all."""
    torch.manual_seed(0)
    model = Experts()
    inputs = [torch.randn(1, 4, 8) for _ in range(6)]
    with pytest.warns(PruningWarning, match="no calibration batch reached"):
        result = prune_model(model, inputs, reconstruct=FAST, **OPTIONS)
    assert [report.name for report in result.blocks] == ["blocks.0", "blocks.1"]
    assert result.unreached


class Routed(nn.Module):
    """Each token goes to one of six experts, and none to the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x.abs().argmax(-1) % 5
        output = x.clone()
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                output[chosen == i] = x[chosen == i] + expert(x[chosen == i])
        return output


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Routed() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Module):
    """Blocks that hand on two tensors of hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStates() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        for block in self.blocks:
            x, residual = block(x, residual)
        return x + residual


class TwoStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        residual = residual + x
        return self.linear(residual).tanh(), residual


def test_a_second_tensor_of_hidden_states_is_named():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 16, 8) for _ in range(8)]
    with pytest.warns(PruningWarning, match=r"reconstructed with target=.block.: blocks\.1"):
        prune_model(Residual(), inputs, reconstruct=FAST, **OPTIONS)


def test_inference_mode():
    """As Lightning's evaluation: batches and the user's forward are in inference mode."""

    @torch.inference_mode()
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    masked = [{**b, "attention_mask": torch.ones(1, 24, dtype=torch.bool)} for b in data()]
    for batch in masked:
        batch["attention_mask"][:, 20:] = False
    model = build("llama")
    with torch.inference_mode():
        inputs = ({key: x.clone() for key, x in batch.items()} for batch in masked)
        result = prune_model(model, inputs, reconstruct=FAST, **OPTIONS)
    assert all(block.error_reconstructed < block.error for block in result.blocks)
    result = prune_model(build("llama"), data(), reconstruct=FAST, forward=forward, **OPTIONS)
    assert all(block.error_reconstructed < block.error for block in result.blocks)


class Mixed(nn.Module):
    """Scales the hidden states between two blocks, which no block's output shows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = 2 * block(x)
        return x


def test_blocks_that_are_not_chained_are_named():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 16, 8) for _ in range(8)]
    with pytest.warns(PruningWarning, match=r"reconstructed with target=.block.: blocks\.1"):
        prune_model(Mixed(), inputs, reconstruct=FAST, **OPTIONS)


def test_combinations_that_are_refused():
    for order in ("layer", "dense"):
        with pytest.raises(ValueError, match="use calibration_order='block'"):
            prune_model(build("llama"), data(), calibration_order=order, reconstruct=True)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="Sequential has none: blocks are the children"):
        prune_model(layers, [torch.randn(4, 8)] * 4, **OPTIONS, reconstruct=True)
    with pytest.raises(ValueError, match="one of which is held out, but got 1"):
        prune_model(build("llama"), data(count=1), **OPTIONS, reconstruct=True)


def test_true_is_the_default():
    settings = BlockReconstruction(epochs=1)
    model = copy.deepcopy(build("llama"))
    result = prune_model(model, data(count=2), **OPTIONS, reconstruct=settings)
    assert [block.steps for block in result.blocks] == [1, 1]
    assert prune_model(build("llama"), data(count=2), **OPTIONS, reconstruct=False).blocks == []
    reports = prune_model(build("llama"), data(count=2), **OPTIONS, reconstruct=True).blocks
    assert [len(report.errors) for report in reports] == [7, 7]


def prune_on_ranks(rank: int, size: int, folder: Any, strategy: str) -> None:
    for target in ("block", "model"):
        model = llama_of_three()
        communicator = SINGLE_PROCESS if strategy == "alone" else shard(model, strategy)
        settings = BlockReconstruction(
            epochs=2, learning_rate=1e-2, target=target, batches_per_step=2
        )
        local = communicator.shard(data(count=7))
        result = prune_model(
            model, local, communicator=communicator, reconstruct=settings, **OPTIONS
        )
        weights = {key: full_tensor(p) for key, p in model.state_dict().items()}
        errors = [block.errors for block in result.blocks]
        saved = {"weights": weights, "errors": errors, "masks": dict(result.masks)}
        torch.save(saved, folder / f"{target}-{rank}.pt")


def llama_of_three() -> nn.Module:
    torch.manual_seed(0)
    return llama(num_hidden_layers=3).eval()


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
def test_ranks_agree_with_one_process_up_to_rounding(tmp_path, strategy, size):
    alone = tmp_path / "alone"
    alone.mkdir()
    prune_on_ranks(0, 1, alone, "alone")
    run_group(prune_on_ranks, size, tmp_path, strategy)
    for target in ("block", "model"):
        expected = torch.load(alone / f"{target}-0.pt", weights_only=True)
        saved = [
            torch.load(tmp_path / f"{target}-{rank}.pt", weights_only=True) for rank in range(size)
        ]
        for rank in range(size):
            for key, weight in saved[0]["weights"].items():
                assert torch.equal(saved[rank]["weights"][key], weight), key
            for mine, other in zip(saved[rank]["errors"], expected["errors"], strict=True):
                assert mine == pytest.approx(other, rel=1e-3)
            for key, mask in expected["masks"].items():
                assert (saved[rank]["masks"][key] != mask).float().mean() < 2e-3, key


def resume_on_ranks(rank: int, size: int, folder: Any, strategy: str) -> None:
    """Stopped in the third block and resumed, against an uninterrupted run on as many ranks."""
    for target in ("block", "model"):
        settings = BlockReconstruction(epochs=1, learning_rate=1e-2, target=target)

        def run(settings: BlockReconstruction = settings, **options: Any) -> Any:
            model = llama_of_three()
            communicator = shard(model, strategy)
            local = communicator.shard(data(count=6))
            arguments = {**OPTIONS, "reconstruct": settings, **options}
            result = prune_model(model, local, communicator=communicator, **arguments)
            return result, {key: full_tensor(p) for key, p in model.state_dict().items()}

        expected, weights = run()
        journal = folder / f"journal-{target}"
        with pytest.raises(PruningError, match="start the same run again"):
            run(journal=journal, hooks=[StopAfter(16)])
        communicator = Communicator.from_default_group()
        communicator.barrier()
        result, resumed = run(journal=journal)
        assert [b.errors for b in result.blocks] == [b.errors for b in expected.blocks]
        for key, weight in weights.items():
            assert torch.equal(resumed[key], weight), key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_resumes_bit_for_bit_on_several_ranks(tmp_path, strategy):
    run_group(resume_on_ranks, 2, tmp_path, strategy)


def refused(rank: int, size: int, folder: Any) -> None:
    model = build("llama")
    try:
        prune_model(model, data(), communicator=shard(model, "tensor"), reconstruct=FAST, **OPTIONS)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_tensor_parallelism_is_refused(tmp_path):
    run_group(refused, 2, tmp_path)
    for rank in range(2):
        assert "not supported for tensor parallelism" in (tmp_path / f"{rank}.txt").read_text()


def fail(rank: int, size: int, folder: Any) -> None:
    model = build("llama")
    calls = []

    def break_down(*_: Any) -> None:
        calls.append(1)
        if rank == 1 and torch.is_grad_enabled():
            raise RuntimeError("boom")

    model.model.layers[1].mlp.register_forward_pre_hook(break_down)
    communicator = Communicator.from_default_group()
    try:
        local = communicator.shard(data())
        prune_model(model, local, communicator=communicator, reconstruct=FAST, **OPTIONS)
    except PruningError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_an_error_while_training_ends_all_ranks(tmp_path):
    run_group(fail, 2, tmp_path)
    assert "rank 1 of 2 failed: RuntimeError: boom" in (tmp_path / "0.txt").read_text()
    assert "boom" in (tmp_path / "1.txt").read_text()
