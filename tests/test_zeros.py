"""The zeros that the weights have are those that result, manifest and log state, after any run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn

from symprune_lightning import (
    BlockReconstruction,
    CalibrationDataModule,
    CausalLMModule,
    CubicSchedule,
    MaskedFinetuning,
    PruneResult,
    PruningWarning,
    StreamedCheckpoint,
    SymPrune,
    Trainer,
    prune_model,
)
from symprune_lightning.callbacks.progress import summary
from tests.groups import run_trainers
from tests.models import VOCABULARY, batches, build
from tests.pretended.runs import methods
from tests.trainers import TRAINER

METHODS = {
    **methods(),
    "GradientWanda": {"score": "gradientwanda", "group": "layer"},
    "Sensitivity": {"allocation": "sensitivity"},
    "reconstruct": {"reconstruct": BlockReconstruction(epochs=1), "calibration_order": "block"},
    "group block": {"group": "block", "calibration_order": "block"},
    "group model": {"group": "model", "calibration_order": "dense"},
    "several": {"refine": ["dsnot", "exactswap"], "update": "maskedcg", "allocation": "owl"},
    "chosen layers": {"only": ["re:.*mlp.*"], "ignore": ["re:.*mlp.*(down_proj|c_proj).*"]},
}
MODELS = ["llama", "gpt2", "mixtral"]


def weights_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model if isinstance(model, Mapping) else dict(model.named_parameters())


def check(model: nn.Module | Mapping[str, Tensor], result: PruneResult) -> None:
    """Count zeros in the weights, and compare them with every figure of the result."""
    weights = weights_of(model)
    zeros = total = 0
    for report in result.layers:
        matrix = matrix_of(weights, report.name, report.shape)
        mask = result.masks[report.name]
        assert not matrix[~mask].any(), report.name
        count = int((matrix == 0).sum())
        assert count == report.num_zeros == int((~mask).sum()), report.name
        assert report.sparsity == count / matrix.numel()
        zeros, total = zeros + count, total + matrix.numel()
    assert result.sparsity == pytest.approx(zeros / total)
    assert set(result.masks) == {report.name for report in result.layers}
    cell = summary(result, {}, {})[0].columns[3]._cells[-1]
    assert float(str(cell)) == pytest.approx(zeros / total, abs=1e-3)


def matrix_of(weights: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """Return the matrix of a layer without the library's own functions."""
    if f"{name}.weight" in weights:
        weight = weights[f"{name}.weight"]
    else:  # an expert of a packed parameter
        parameter, _, expert = name.rpartition(".")
        weight = weights[parameter][int(expert)]
    return weight if tuple(weight.shape) == shape and "c_" not in name else weight.T


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(METHODS)),
    model=st.sampled_from(MODELS),
    sparsity=st.floats(0.05, 0.9),
    seed=st.integers(0, 3),
)
@pytest.mark.filterwarnings("ignore::symprune_lightning.PruningWarning")
def test_after_any_method(name, model, sparsity, seed):
    options = {"score": "ria", **METHODS[name]}
    if "pattern" not in options:
        options["sparsity"] = sparsity
    pruned = build(model, seed=seed)
    check(pruned, prune_model(pruned, batches(model), **options))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.filterwarnings("ignore::symprune_lightning.PruningWarning")
def test_after_each_method(name):
    model = build("llama")
    check(model, prune_model(model, batches("llama"), **{"score": "ria", **METHODS[name]}))


def test_after_pruning_further():
    """Weights that were zero before stay zero, and are counted once."""
    model = build("llama")
    prune_model(model, batches("llama"), score="wanda", sparsity=0.3)
    check(model, prune_model(model, batches("llama"), score="ria", sparsity=0.6))


def data() -> CalibrationDataModule:
    torch.manual_seed(3)
    texts = torch.randint(3, VOCABULARY, (40, 16)).tolist()
    return CalibrationDataModule(
        texts, sequences=4, evaluation_sequences=4, sequence_length=16, training_sequences=6
    )


def check_folder(folder: Path) -> None:
    """Count the zeros of a written checkpoint, and compare them with its manifest."""
    manifest = json.loads((folder / "sparsity_manifest.json").read_text())
    weights = {
        k: x for file in folder.glob("model*.safetensors") for k, x in load_file(file).items()
    }
    zeros = total = 0
    for layer in manifest["layers"]:
        matrix = matrix_of(weights, layer["name"], tuple(layer["shape"]))
        count = int((matrix == 0).sum())
        assert layer["sparsity"] == count / matrix.numel(), layer["name"]
        zeros, total = zeros + count, total + matrix.numel()
    assert manifest["sparsity"] == pytest.approx(zeros / total)
    assert total > 0


def stored_weights(folder: Path) -> dict[str, Tensor]:
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


RUNS = {"ddp": "ddp", "fsdp2": (2, 1), "tensor parallel": (1, 2)}


def prune_in_a_group(rank: int, size: int, folder: Path, name: str) -> None:
    setting = RUNS[name]
    strategy: Any = setting
    if not isinstance(setting, str):
        strategy = ModelParallelStrategy(setting[0], setting[1])  # type: ignore[arg-type]
    callback = SymPrune("ria", sparsity=0.55, refine="exactswap", update="obsupdate")
    Trainer(**TRAINER, strategy=strategy, devices=size).prune(
        CausalLMModule(str(folder / "dense")),
        datamodule=data(),
        callbacks=callback,
        output=str(folder / "out"),
    )
    assert callback.result is not None
    torch.save(callback.result.sparsity, folder / f"{rank}.pt")


@pytest.mark.parametrize("name", RUNS)
def test_after_a_run_on_two_processes(tmp_path, name):
    build("llama").save_pretrained(tmp_path / "dense")
    run_trainers(prune_in_a_group, 2, tmp_path, name)
    check_folder(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "sparsity_manifest.json").read_text())
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == manifest["sparsity"]


@pytest.mark.parametrize("update", [None, "maskedcg"])
def test_after_streaming(tmp_path, update):
    build("llama").save_pretrained(tmp_path / "dense")
    with StreamedCheckpoint(tmp_path / "dense", tmp_path / "out") as checkpoint:
        result = prune_model(
            checkpoint.model, batches("llama"), update=update, placement=checkpoint
        )
        checkpoint.save({"sparsity": result.sparsity})
    check(stored_weights(tmp_path / "out"), result)


class StopRunError(Exception):
    """Ends a run in its middle."""


def test_after_a_run_that_was_resumed(tmp_path):
    from symprune_lightning import PruningHooks
    from symprune_lightning.errors import PruningError

    class Interrupt(PruningHooks):
        def on_layer_pruned(self, report, mask):
            if report.name.startswith("model.layers.1.mlp"):
                raise StopRunError

    options: dict[str, Any] = {"refine": "exactswap", "update": "obsupdate", "journal": tmp_path}
    with pytest.raises(PruningError):
        prune_model(build("llama"), batches("llama"), hooks=[Interrupt()], **options)
    model = build("llama")
    check(model, prune_model(model, batches("llama"), **options))


@pytest.mark.parametrize("when", ["fit_start", "fit_end", CubicSchedule(end=4, every=2)])
def test_after_a_fit(when):
    module = CausalLMModule(build("llama").train(), learning_rate=1e-3)
    pruning = SymPrune("wanda", sparsity=0.6, when=when)
    kept = [] if when == "fit_end" else [MaskedFinetuning()]
    Trainer(**TRAINER, max_epochs=1, limit_val_batches=0).fit(
        module, datamodule=data(), callbacks=[pruning, *kept]
    )
    check(module.prunable_model, pruning.result)


def test_after_a_fit_that_is_resumed_with_a_higher_sparsity(tmp_path):
    """The masks of the checkpoint are merged with the new ones, and the weights have the new."""

    def fit(sparsity: float, epochs: int, resume: Path | None) -> tuple[nn.Module, PruneResult]:
        module = CausalLMModule(build("llama").train(), learning_rate=1e-3)
        pruning = SymPrune("wanda", sparsity=sparsity, when="fit_start")
        trainer = Trainer(
            **TRAINER,
            max_epochs=epochs,
            limit_val_batches=0,
            callbacks=[pruning, MaskedFinetuning()],
        )
        trainer.fit(module, datamodule=data(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.prunable_model, pruning.result

    check(*fit(0.5, 1, None))
    model, result = fit(0.75, 2, tmp_path / "last.ckpt")
    assert result.sparsity == 0.75
    check(model, result)


def test_a_validation_without_batches_prunes_nothing_and_says_so():
    for limits in ({"limit_val_batches": 0}, {}):
        module, pruning = CausalLMModule(build("llama")), SymPrune("wanda")
        source = {"datamodule": data()} if limits else {"dataloaders": []}
        with pytest.warns(
            PruningWarning, match="pruned nothing in this validate: no batch was run"
        ):
            Trainer(**TRAINER, **limits).validate(
                module, callbacks=pruning, verbose=False, **source
            )
        assert pruning.result is None
