"""Whole runs under Lightning's strategies, each compared with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune, Trainer
from tests.groups import run_trainers
from tests.models import VOCABULARY, build
from tests.texts import texts, tokenizer
from tests.trainers import TRAINER

STRATEGIES = {
    "ddp2": (2, "ddp"),
    "ddp3": (3, "ddp"),
    "fsdp2": (2, (2, 1)),
    "tensor2": (2, (1, 2)),
}
SEQUENCES = (5, 7, 9)
"""Numbers of sequences: of token ids; of two overlapping evaluation sets; of padded texts."""


def data(folder: Path, sequences: int) -> CalibrationDataModule:
    if sequences == 9:
        rows = [" ".join(text.split()[: 3 + i % 12]) for i, text in enumerate(texts(40))]
        sizes = {"sequences": 9, "evaluation_sequences": 9, "sequence_length": 16, "batch_size": 2}
        return CalibrationDataModule(rows, tokenizer(), packing=False, **sizes)
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (40, 16)).tolist()
    several = {name: torch.randint(3, VOCABULARY, (20, 16)).tolist() for name in ("some", "others")}
    return CalibrationDataModule(
        ids,
        evaluation=several if sequences == 7 else None,
        sequences=sequences,
        evaluation_sequences=sequences,
        evaluation_stride=5 if sequences == 7 else None,
        sequence_length=16,
        batch_size=2 if sequences == 7 else 1,
    )


def prune(folder: Path, sequences: int, output: str, **trainer: Any) -> dict[str, Any]:
    module = CausalLMModule(str(folder / "dense"))
    callback = SymPrune("wanda", sparsity=0.5, refine="exactswap")
    result = Trainer(**TRAINER, **trainer).prune(
        module, datamodule=data(folder, sequences), callbacks=callback, output=output
    )
    return {
        "masks": dict(result.masks),
        "dense": callback.dense_metrics,
        "sparse": callback.sparse_metrics,
    }


def prune_all(rank: int, size: int, folder: Path, name: str) -> None:
    _, setting = STRATEGIES[name]
    for sequences in SEQUENCES:
        sizes = {"data_parallel_size": setting[0], "tensor_parallel_size": setting[1]}
        strategy = setting if isinstance(setting, str) else ModelParallelStrategy(**sizes)
        output = str(folder / f"{name}-{sequences}")
        saved = prune(folder, sequences, output, strategy=strategy, devices=size)
        torch.save(saved, folder / f"{name}-{sequences}-{rank}.pt")


def save_sharded_and_full(rank: int, size: int, folder: Path) -> None:
    for sharded in (True, False):
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=sharded)
        module = CausalLMModule(str(folder / "dense"))
        trainer = Trainer(**TRAINER, strategy=strategy, devices=size)
        callback = SymPrune("wanda", sparsity=0.5, baseline=False)
        trainer.validate(module, datamodule=data(folder, 5), callbacks=callback, verbose=False)
        trainer.save_checkpoint(folder / ("sharded.ckpt" if sharded else "full.ckpt"))


def test_lightning_checkpoints_of_a_sharded_model(folder):
    """Saved under FSDP2, loaded in one process."""
    run_trainers(save_sharded_and_full, 2, folder)
    single = CausalLMModule(str(folder / "dense"))
    pruning = SymPrune("wanda", sparsity=0.5, baseline=False)
    Trainer(**TRAINER, devices=1).validate(
        single, datamodule=data(folder, 5), callbacks=pruning, verbose=False
    )
    assert (folder / "sharded.ckpt").is_dir()
    dcp_to_torch_save(folder / "sharded.ckpt", folder / "joined.ckpt")
    for name in ("joined.ckpt", "full.ckpt"):
        state = torch.load(folder / name, weights_only=True)["state_dict"]
        module = CausalLMModule(str(folder / "dense"))
        module.configure_model()
        module.load_state_dict(state)
        assert pruning.result is not None
        assert pruning.result.is_applied_to(module.prunable_model)
        for key, weight in single.state_dict().items():
            assert torch.equal(module.state_dict()[key], weight), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    build("llama").save_pretrained(folder / "dense")
    for sequences in SEQUENCES:
        saved = prune(folder, sequences, str(folder / f"single-{sequences}"), devices=1)
        torch.save(saved, folder / f"single-{sequences}.pt")
    return folder


@pytest.fixture(scope="module", params=STRATEGIES)
def strategy(request, folder):
    run_trainers(prune_all, STRATEGIES[request.param][0], folder, request.param)
    return request.param


@pytest.mark.parametrize("sequences", SEQUENCES)
def test_a_run_equals_that_of_one_process(folder, strategy, sequences):
    single = torch.load(folder / f"single-{sequences}.pt", weights_only=True)
    for rank in range(STRATEGIES[strategy][0]):
        saved = torch.load(folder / f"{strategy}-{sequences}-{rank}.pt", weights_only=True)
        assert saved["masks"].keys() == single["masks"].keys()
        for name, mask in single["masks"].items():
            assert torch.equal(saved["masks"][name], mask), name
        for metrics in ("dense", "sparse"):
            assert saved[metrics] == pytest.approx(single[metrics], rel=1e-6)


@pytest.mark.parametrize("sequences", SEQUENCES)
def test_the_checkpoint_equals_that_of_one_process(folder, strategy, sequences):
    single = AutoModelForCausalLM.from_pretrained(folder / f"single-{sequences}").state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder / f"{strategy}-{sequences}")
    assert model.state_dict().keys() == single.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, single[name]), name
