"""The report shows what the manifest says, and nothing from the net."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    SymPrune,
    Trainer,
    prune_model,
)
from symprune_lightning.export import MANIFEST
from symprune_lightning.report import Report
from symprune_lightning.report.pictures import chosen_layers, histogram
from tests.models import batches, build
from tests.texts import texts, tokenizer


def run(folder, *callbacks, output="out", **options):
    data = CalibrationDataModule(
        texts(), tokenizer(), sequences=4, sequence_length=16, evaluation_sequences=4
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**{**quiet, "accelerator": "cpu", **options})
    module = CausalLMModule(build("llama"))
    arguments = {"datamodule": data, "callbacks": list(callbacks)}
    if output is None:
        trainer.validate(module, **arguments, verbose=False)
    else:
        trainer.prune(module, output=str(folder / output), **arguments)


class Page(HTMLParser):
    """Texts of table cells and of figures, and what is fetched."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.bold, self.fetched, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.fetched += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        if self.inside == "td":
            self.cells.append(data.strip())
        if self.inside == "b":
            self.bold.append(data.strip())


@pytest.mark.parametrize("order", [1, -1])
def test_figures_are_those_of_the_manifest(tmp_path, order):
    report = Report(prompts=["w1 w2 w3", "<w4>"], new_tokens=4)
    run(tmp_path, *[report, SymPrune("ria", sparsity=0.6, refine="exactswap")][::order])
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    metrics = manifest["metrics"]
    for name, value in metrics["pruned"].items():
        assert f"{metrics['dense'][name]:.4f} → {value:.4f}" in page.bold
    assert f"{100 * manifest['sparsity']:.2f} %" in page.bold
    cells = [c for c in page.cells if c]
    rows = [cells[i : i + 7] for i in range(0, len(cells), 7)]
    assert len(rows) == 14
    for row, layer in zip(rows, manifest["layers"], strict=True):
        assert row[0] == layer["name"]
        assert row[2:6] == [
            f"{layer['sparsity']:.4f}",
            f"{layer['error']:.4f}",
            f"{layer['error_refined']:.4f}",
            str(layer["swaps"]),
        ]
    assert page.bold.count("dense") == page.bold.count("pruned") == 2
    assert "&lt;w4&gt;" in text  # what is shown is escaped
    assert all(x.startswith("data:") for x in page.fetched)
    assert not re.search(r"https?://", text)
    pictures = {p.stem for p in (tmp_path / "out" / "symprune").glob("*.png")}
    assert pictures == {"error", "sparsity", "swaps", "scores", "masks", "time"}
    assert text.count("data:image/png;base64,") == len(pictures)


def test_a_method_without_data_has_fewer_pictures(tmp_path):
    run(tmp_path, Report(prompts=[]), SymPrune("magnitude", baseline=False))
    pictures = {p.stem for p in (tmp_path / "out" / "symprune").glob("*.png")}
    assert pictures == {"sparsity", "scores", "masks", "time"}
    assert "What the models say" not in (tmp_path / "out" / "report.html").read_text()


def test_loggers_get_figures_and_pictures(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="board")]
    report = Report(folder=str(tmp_path / "page"), prompts=[])
    run(tmp_path, SymPrune(), report, output=None, logger=loggers)
    assert (tmp_path / "page" / "report.html").is_file()
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    head = next(line for line in lines if "pruning/error" in line)
    assert "pruning/sparsity" in head
    board = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    assert "pruning/error" in board.Tags()["scalars"]
    assert len(board.Scalars("pruning/error")) == 14
    assert "pruning/error" in board.Tags()["images"]


def test_scores_are_shown_as_they_were():
    seen = {}
    model = build("llama")
    prune_model(model, batches(), on_scores=lambda *x: seen.update({x[0]: x[1:]}), sparsity=0.25)
    assert len(seen) == 14
    for name, (scores, mask) in seen.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(mask, weight != 0)
        kept = scores.masked_fill(~mask, torch.inf).amin(1)
        assert (kept >= scores.masked_fill(mask, -torch.inf).amax(1)).all()
        found = histogram(scores, mask)
        assert sum(found.pruned) == pytest.approx(0.25, abs=0.02)
        assert sum(found.kept) == pytest.approx(0.75, abs=0.02)


def test_histograms_of_nothing():
    assert histogram(torch.full((4, 4), -torch.inf), torch.zeros(4, 4, dtype=torch.bool)) is None
    assert histogram(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)) is None


def test_chosen_layers():
    assert chosen_layers([str(i) for i in range(11)]) == ["0", "2", "4", "6", "8", "10"]
    assert chosen_layers(["a"]) == ["a"]
