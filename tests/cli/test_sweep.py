"""Sweeps cache finished methods, resume interrupted ones, and restore the dense weights."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Callback

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    PruningHooks,
    SymPrune,
    Trainer,
)
from symprune_lightning.cli.compare import table
from symprune_lightning.cli.sweep import Sweep, SweepResult
from tests.models import llama


class Observer(Callback, PruningHooks):
    """Counts dense evaluations, runs and scored layers; optionally stops a run half-way."""

    def __init__(self, stop_after: int = 0) -> None:
        self.dense_evaluations, self.runs = 0, 0
        self.scored: list[str] = []
        self.stop_after = stop_after

    def on_dense_evaluation_end(self, metrics):
        self.dense_evaluations += 1

    def on_pruning_start(self, layers):
        self.runs += 1

    def on_layer_scored(self, layer, scores, mask):
        self.scored.append(layer)

    def on_layer_pruned(self, report, mask):
        self.stop_after -= 1
        if self.stop_after == 0:
            raise KeyboardInterrupt


def trainer(callback: SymPrune, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=[callback, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def sweep(folder, blocks: int = 2, **data: int) -> Sweep:
    rows = torch.randint(3, 64, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 4, **data}
    torch.manual_seed(0)
    module = CausalLMModule(llama(num_hidden_layers=blocks))
    return Sweep(module, CalibrationDataModule(rows, **sizes), folder)


def run(swept: Sweep, name: str, method: SymPrune, *callbacks: Callback) -> SweepResult:
    return swept.run(name, trainer(method, *callbacks), method)


def test_results(tmp_path):
    swept = sweep(tmp_path / "new" / "folder")
    wanda = run(swept, "wanda", SymPrune("wanda", sparsity=0.5))
    magnitude = run(swept, "magnitude", SymPrune("magnitude", sparsity=0.75))
    assert (wanda.sparsity, magnitude.sparsity) == (0.5, 0.75)
    assert wanda.dense == magnitude.dense
    assert len({wanda.dense, wanda.perplexity, magnitude.perplexity}) == 3
    assert 0 < wanda.error < 1
    assert magnitude.error is None
    assert min(wanda.seconds, magnitude.seconds) > 0


def test_each_method_starts_from_the_dense_weights(tmp_path):
    swept = sweep(tmp_path)
    first = run(swept, "first", SymPrune("wanda", sparsity=0.5))
    run(swept, "second", SymPrune("magnitude", sparsity=0.9, update="obsupdate"))
    again = run(swept, "again", SymPrune("wanda", sparsity=0.5))
    assert again.perplexity == first.perplexity
    assert again.error == first.error
    assert again.sparsity == 0.5


def test_the_dense_model_is_evaluated_once(tmp_path):
    swept, observer = sweep(tmp_path), Observer()
    for name in ("wanda", "magnitude"):
        run(swept, name, SymPrune(name), observer)
    assert (observer.runs, observer.dense_evaluations) == (2, 1)


def test_finished_methods_are_not_run_again(tmp_path):
    first, observer = run(sweep(tmp_path), "a/b", SymPrune("wanda")), Observer()
    assert first.failure is None
    assert run(sweep(tmp_path), "a/b", SymPrune("wanda"), observer) == first
    assert observer.runs == 0
    # other settings or data are another method
    run(sweep(tmp_path), "a/b", SymPrune("wanda", sparsity=0.6), observer)
    assert observer.runs == 1
    run(sweep(tmp_path), "a/b", SymPrune("wanda"), observer)
    assert observer.runs == 2
    run(sweep(tmp_path, sequences=3), "a/b", SymPrune("wanda"), observer)
    assert observer.runs == 3
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_failure_is_recorded_and_run_again(tmp_path):
    swept, observer = sweep(tmp_path), Observer()
    failed = run(swept, "wrong", SymPrune("wanda", only=["nowhere"]))
    assert failed.failure.startswith("ValueError: 'nowhere' matches none of the")
    assert (failed.sparsity, failed.perplexity) == (None, None)
    assert json.loads((tmp_path / "results.json").read_text())["wrong"]["result"]["failure"]
    # the dense evaluation before the failure is used for the next method
    assert run(swept, "wanda", SymPrune("wanda"), observer).dense > 0
    assert observer.dense_evaluations == 0
    run(sweep(tmp_path), "wrong", SymPrune("wanda", only=["nowhere"]), observer)
    assert observer.dense_evaluations == 1


def test_an_interrupted_method_is_resumed(tmp_path):
    expected = run(sweep(tmp_path / "expected", blocks=3), "wanda", SymPrune("wanda"))
    stop = Observer(stop_after=16)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(sweep(tmp_path / "resumed", blocks=3), "wanda", SymPrune("wanda"), stop)
    assert (tmp_path / "resumed" / ".wanda.journal").is_dir()
    observer = Observer()
    resumed = run(sweep(tmp_path / "resumed", blocks=3), "wanda", SymPrune("wanda"), observer)
    # the first block is read from the journal
    assert {name.split(".")[2] for name in observer.scored} == {"1", "2"}
    assert resumed.perplexity == expected.perplexity
    assert resumed.error == expected.error
    assert resumed.seconds is None, "the time before the interruption is not known"
    assert "resumed" in table([resumed]).columns[4]._cells
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["results.json"]
