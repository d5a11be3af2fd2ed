from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from symprune_lightning import Communicator, PruneResult, PruningWarning, prune_model
from symprune_lightning.engine.layers.order import execution_order
from tests.groups import run_group


class Mixture(nn.Module):
    """Experts, some of which a batch uses, and a layer that is registered first and runs last."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        experts = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)]
        self.experts = nn.ModuleList(experts if nested else [e[0] for e in experts])

    def forward(self, x: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        for expert in chosen:
            x = self.experts[expert](x)
        return self.shared(x)


ROUTES = {
    "one": [[0], [1], [0], [2]],
    "two": [[0, 1], [1], [0], [1, 3]],
    "none": [[], [1], [0, 2], []],
}


def run(routes: list[list[int]], **options) -> PruneResult:
    torch.manual_seed(0)
    model = Mixture(nested=options.pop("nested", False))
    batches = [(torch.randn(3 + i, 8), route) for i, route in enumerate(routes)]
    communicator = options.get("communicator")
    if communicator is not None:
        batches = list(communicator.shard(batches))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no calibration batch reached", PruningWarning)
        return prune_model(model, batches, score="wanda", **options)


def tokens_of(routes: list[list[int]], expert: int | None) -> int:
    return sum(3 + i for i, route in enumerate(routes) if expert is None or expert in route)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_every_layer_waits_for_all_its_batches(routes, nested):
    """No layer is called after it was pruned, which would be warned about."""
    result = run(routes, nested=nested)
    found = {report.name: report.tokens for report in result.layers}
    assert found.pop("shared") == tokens_of(routes, None)
    for name, tokens in found.items():
        assert tokens == tokens_of(routes, int(name.split(".")[1])), name


def prune_on_ranks(rank: int, size: int, folder: Path) -> None:
    for name, routes in ROUTES.items():
        result = run(routes, communicator=Communicator.from_default_group())
        torch.save(dict(result.masks.items()), folder / f"{name}-{rank}.pt")
    dist.barrier()


def test_ranks_agree_on_the_order(tmp_path):
    run_group(prune_on_ranks, 2, tmp_path)
    for name, routes in ROUTES.items():
        expected = dict(run(routes).masks.items())
        for rank in range(2):
            masks = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert masks.keys() == expected.keys()
            assert all(torch.equal(masks[key], mask) for key, mask in expected.items()), name


def test_unused_modules_stay_where_they_are_registered():
    model = Mixture()
    position = execution_order(model, [[model.experts[2], model.shared]])
    order = sorted([*model.experts, model.shared], key=lambda module: position[module])
    assert order == [*model.experts, model.shared]


def test_contradictions_end_in_the_order_of_registration():
    model = Mixture()
    first, second = model.experts[0], model.experts[1]
    position = execution_order(model, [[first, second], [second, first]])
    assert position[first] < position[second]
    assert len(position) == len(list(model.modules()))
