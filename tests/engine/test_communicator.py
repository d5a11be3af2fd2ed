from __future__ import annotations

import os
import signal
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from symprune_lightning import (
    NM,
    LayerSolver,
    MaskRefiner,
    OBSUpdate,
    R2DSnoT,
    Score,
    WeightUpdate,
    load_masks,
    save_masks,
)
from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS, Communicator
from symprune_lightning.engine.layers.find import find_layers
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.functional.allocation import AllocationMethod
from symprune_lightning.functional.registry import leaves
from tests.groups import _join, run_group
from tests.models import batches, build

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"score": "wanda"},
    "ria-r2dsnot": {"score": "ria", "refine": R2DSnoT(threshold=1e-3)},
    "exactswap": {"score": "wanda", "refine": "exactswap"},
    "2:4": {"score": "ria", "pattern": "2:4"},
    "permuted": {"score": "ria", "pattern": NM(2, 4, permute=True)},
    "block": {"score": "ria", "refine": ["r2dsnot", "exactswap"], "calibration_order": "block"},
    "dense": {"score": "symwanda", "calibration_order": "dense", "group": "model"},
    "layer": {"score": "wanda", "group": "layer"},
    "update": {"score": "ria", "sparsity": 0.6, "update": OBSUpdate()},
    "sparsegpt": {"solver": "sparsegpt", "group": "layer"},
    "owl": {"score": "wanda", "allocation": "owl"},
    "magnitude": {"score": "magnitude"},
}
SEQUENCES = (1, 5, 7)


def data(sequences: int) -> list[dict[str, torch.Tensor]]:
    return batches(count=sequences, size=1, length=12 + sequences)


def prune(
    model: torch.nn.Module, method: str, sequences: int, communicator: Communicator = SINGLE_PROCESS
) -> Any:
    local = communicator.shard(data(sequences))
    return prune_model(model, local, communicator=communicator, **METHODS[method])


@cache
def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


def shard(model: torch.nn.Module, strategy: str) -> Communicator:
    """Shard the model as the strategy does, and return the communicator."""
    mesh = mesh_of(dist.get_world_size())
    if strategy == "ddp":
        return Communicator.from_default_group()
    if strategy == "fsdp":
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return Communicator.from_default_group()
    for block in model.model.layers:
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
        plan |= {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")}
        plan |= {n: RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(block, mesh, plan)
    return Communicator.from_default_group(0, 1)


def leaf_methods() -> dict[str, dict[str, Any]]:
    """Every method of the package, with default arguments; a new one is added by itself."""
    bases: dict[str, Any] = {
        "score": Score,
        "refine": MaskRefiner,
        "update": WeightUpdate,
        "solver": LayerSolver,
        "allocation": AllocationMethod,
    }
    return {
        f"{argument}={cls.__name__}": {argument: cls(), "group": "layer"}
        for argument, base in bases.items()
        for cls in leaves(base)
        if cls.__module__.startswith("symprune_lightning")
    }


def prune_leaves(rank: int, size: int, folder: Any) -> None:
    communicator = Communicator.from_default_group()
    for name, options in leaf_methods().items():
        local = communicator.shard(data(5))
        result = prune_model(build("llama"), local, communicator=communicator, **options)
        save_masks(folder / f"{name}-{rank}.safetensors", result.masks)


def test_masks_of_every_method_equal_those_of_one_process(tmp_path):
    run_group(prune_leaves, 2, tmp_path)
    for name, options in leaf_methods().items():
        expected = prune_model(build("llama"), data(5), **options).masks
        for rank in range(2):
            assert load_masks(tmp_path / f"{name}-{rank}.safetensors") == expected, name


def few_rows(count: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, count))


def prune_few_rows(rank: int, size: int, folder: Any) -> None:
    communicator = Communicator.from_default_group()
    torch.manual_seed(1)
    x = list(torch.randn(4, 6, 8))
    for count in (1, 2, 3):
        for score in ("magnitude", "wanda", "ri", "ria", "lpria", "stochria"):
            alone = prune_model(few_rows(count), x, score=score)
            local = communicator.shard(x)
            result = prune_model(few_rows(count), local, communicator=communicator, score=score)
            assert result.masks == alone.masks, (count, score)


def test_layers_with_fewer_rows_than_ranks(tmp_path):
    run_group(prune_few_rows, 4, tmp_path)


def prune_all(rank: int, size: int, folder: Any, strategy: str) -> None:
    for method in METHODS:
        for sequences in SEQUENCES:
            model = build("llama")
            result = prune(model, method, sequences, shard(model, strategy))
            weights = {x.name: x.matrix() for x in find_layers(model, result.masks)}
            figures = [(x.name, x.swaps, x.tokens, x.error_refined) for x in result.layers]
            saved = {"masks": dict(result.masks), "weights": weights, "figures": figures}
            torch.save(saved, folder / f"{method}-{sequences}-{rank}.pt")
            model(**data(1)[0])  # the model still runs as it did before


@pytest.fixture(
    scope="module",
    params=[("ddp", 2), ("ddp", 3), ("fsdp", 2), ("tensor", 2)],
    ids=lambda p: f"{p[0]}{p[1]}",
)
def group(request, tmp_path_factory):
    strategy, size = request.param
    folder = tmp_path_factory.mktemp(f"{strategy}{size}")
    run_group(prune_all, size, folder, strategy)
    return folder, size


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("method", METHODS)
def test_masks_equal_those_of_one_process(group, method, sequences):
    folder, size = group
    model = build("llama")
    alone = prune(model, method, sequences)
    for rank in range(size):
        saved = torch.load(folder / f"{method}-{sequences}-{rank}.pt", weights_only=True)
        assert list(saved["masks"]) == list(alone.masks)
        for name, mask in alone.masks.items():
            assert torch.equal(saved["masks"][name], mask), name
            weight = model.get_submodule(name).weight
            torch.testing.assert_close(saved["weights"][name], weight, rtol=1e-4, atol=1e-5)
            assert torch.equal(saved["weights"][name] == 0, weight == 0)
        for mine, figure in zip(alone.layers, saved["figures"], strict=True):
            assert figure[:3] == (mine.name, mine.swaps, mine.tokens)
            error = mine.error_refined
            assert figure[3] == (error if error is None else pytest.approx(error, rel=1e-4))


@given(size=st.integers(1, 9), count=st.integers(0, 40))
def test_every_row_and_every_batch_belongs_to_one_rank(size, count):
    group = [Communicator(r, size, r, size) for r in range(size)]
    rows = [row for one in group for row in range(count)[one.row_slice(count)]]
    assert rows == list(range(count))
    batches_of_all = [batch for one in group for batch in one.shard(range(count))]
    assert sorted(batches_of_all) == list(range(count))


def fail(rank: int, size: int, folder: Any, how: str) -> None:
    """Rank 1 fails at its second batch, in the middle of the model."""
    model = build("llama")
    seen = []

    def break_down(*_: Any) -> None:
        seen.append(1)
        if rank == 1 and len(seen) == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("boom")

    model.model.layers[1].mlp.register_forward_pre_hook(break_down)
    try:
        prune(model, "wanda", 5, shard(model, "fsdp" if how == "fsdp" else "ddp"))
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("how", ["raised", "fsdp"])
def test_an_error_on_one_rank_ends_all(how, tmp_path):
    run_group(fail, 2, tmp_path, how)
    for rank, reason in ((0, "rank 1 of 2 failed: RuntimeError: boom"), (1, "boom")):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert message.startswith("PruningError: pruning stopped after ")
        assert reason in message


def test_a_killed_rank_does_not_block_the_others(tmp_path):
    context = torch.multiprocessing.spawn(
        _join, args=(fail, 3, tmp_path, ("killed",)), nprocs=3, join=False
    )
    for process in context.processes:
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        assert "pruning stopped after" in (tmp_path / f"{rank}.txt").read_text()


def different(rank: int, size: int, folder: Any) -> None:
    model = build("llama", seed=rank)
    try:
        prune(model, "wanda", 2, Communicator.from_default_group())
    except Exception as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_ranks_with_different_models(tmp_path):
    run_group(different, 2, tmp_path)
    assert "the ranks hold different weights" in (tmp_path / "0.txt").read_text()
    assert "the ranks hold different weights" in (tmp_path / "1.txt").read_text()
