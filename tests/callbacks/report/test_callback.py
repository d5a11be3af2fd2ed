"""The report shows the figures of the manifest and loads nothing from the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import transformers as tf
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    MaskedFinetuning,
    Report,
    SymPrune,
    Trainer,
)
from symprune_lightning.callbacks.report.callback import format_metric
from symprune_lightning.checkpoints.manifest import read_manifest
from tests.models import build
from tests.texts import texts, tokenizer
from tests.trainers import TRAINER


def run(folder, *callbacks, output="out", encoder=None, evaluation=None, **options):
    sizes = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 4}
    data = CalibrationDataModule(texts(), encoder or tokenizer(), evaluation=evaluation, **sizes)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**{**quiet, "accelerator": "cpu", **options})
    module = CausalLMModule(build("llama"))
    arguments = {"datamodule": data, "callbacks": list(callbacks)}
    if output is None:
        trainer.validate(module, **arguments, verbose=False)
    else:
        trainer.prune(module, output=str(folder / output), **arguments)


class Page(HTMLParser):
    """Texts of table cells, headings and figures of a page, and the addresses it loads."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.bold, self.headings, self.loaded, self.inside = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.loaded += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        if self.inside == "td":
            self.cells.append(data.strip())
        if self.inside == "b":
            self.bold.append(data.strip())
        if self.inside == "h2" and data.strip():
            self.headings.append(data.strip())


@pytest.mark.parametrize("order", [1, -1])
def test_figures_are_those_of_the_manifest(tmp_path, order):
    report = Report(prompts=["w1 w2 w3", "<w4>"], new_tokens=4)
    run(tmp_path, *[report, SymPrune("ria", sparsity=0.6, refine="exactswap")][::order])
    manifest = read_manifest(tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    metrics = manifest["metrics"]
    for name, value in metrics["pruned"].items():
        dense = metrics["dense"][name]
        assert f"{format_metric(dense)} → {format_metric(value)}" in page.bold
    assert f"{100 * manifest['sparsity']:.2f} %" in page.bold
    cells = [c for c in page.cells if c]
    # the last row is that of the table of weights that were left dense
    assert cells[14 * 8 :] == ["lm_head.weight", "64 × 32", "2048", "output projection"]
    rows = [cells[i : i + 8] for i in range(0, 14 * 8, 8)]
    for row, layer in zip(rows, manifest["layers"], strict=True):
        assert row[0] == layer["name"]
        assert row[2:7] == [
            str(layer["tokens"]),
            f"{layer['sparsity']:.4f}",
            f"{layer['error']:.4f}",
            f"{layer['error_refined']:.4f}",
            str(layer["swaps"]),
        ]
    assert page.bold.count("dense") == page.bold.count("pruned") == 2
    assert "Generated text" in page.headings
    assert "&lt;w4&gt;" in text
    assert "<w4>" not in text
    assert all(x.startswith("data:") for x in page.loaded)
    assert not re.search(r"https?://", text)
    images = {p.stem for p in (tmp_path / "out" / "symprune").glob("*.png")}
    assert images == {"error", "swaps", "scores", "masks", "time"}
    assert text.count("data:image/png;base64,") == len(images)


def test_a_run_without_a_refiner_has_no_columns_for_it(tmp_path):
    run(tmp_path, Report(prompts=["w1 w2"], new_tokens=3), SymPrune("ria"))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<th>refined</th>" not in text
    assert "<th>swaps</th>" not in text
    assert len([c for c in Page(text).cells if c]) == 14 * 6 + 4
    assert "The most likely 3 tokens; each prompt is given as it is." in text


def test_the_same_figures_as_json(tmp_path):
    report = Report(prompts=["w1 w2"], new_tokens=2)
    evaluation = {"docs": None, "other": texts(80)[40:]}
    run(tmp_path, report, SymPrune("ria", refine="exactswap"), evaluation=evaluation)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["manifest"] == read_manifest(tmp_path / "out")
    assert content["asked"] == (
        "score RIA(alpha=0.5), sparsity 0.5, group output, refine ExactSwap(cycles=50), calibrated "
        "on texts in memory (4 × 16 tokens)"
    )
    dense, pruned = (content["manifest"]["metrics"][x] for x in ("dense", "pruned"))
    name = "val_perplexity/other"
    ratio = f"{name}: {pruned[name] / dense[name]:.2f} × that of the dense model"
    assert content["outcome"][1].startswith(ratio)
    assert len(content["outcome"]) == 2
    assert content["samples"][0].keys() == {"prompt", "dense", "pruned"}
    assert {"loading", "evaluation, dense"} <= content["seconds"].keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert content["asked"] in page
    assert ratio in page


def test_prompts_of_a_model_with_a_chat_template(tmp_path):
    encoder, seen = tokenizer(), []
    encoder.chat_template = "{% for m in messages %}w9 {{ m['content'] }}{% endfor %} w8"
    report, generate = Report(prompts=["w1 w2"], new_tokens=2), tf.GenerationMixin.generate

    def recorded(model, *arguments, **options):
        seen.append(options["input_ids"].tolist())
        return generate(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.GenerationMixin, "generate", recorded)
        run(tmp_path, report, SymPrune("wanda"), encoder=encoder)
    assert seen == [[encoder("w9 w1 w2 w8").input_ids]] * 2


@pytest.mark.parametrize("evaluation", [None, texts(80)[40:]])
def test_an_evaluation_on_the_calibration_source_is_named(tmp_path, evaluation):
    run(tmp_path, Report(prompts=[]), SymPrune("wanda"), evaluation=evaluation)
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("are from one source" in page) == (evaluation is None)


def test_a_method_without_data_has_fewer_figures(tmp_path):
    run(tmp_path, Report(prompts=[]), SymPrune("magnitude", baseline=False))
    images = {p.stem for p in (tmp_path / "out" / "symprune").glob("*.png")}
    assert images == {"scores", "masks", "time"}
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.headings[-3:] == ["Layers", "Left dense", "Settings"]
    assert "Generated text" not in page.headings


def test_loggers_get_scalars_and_figures(tmp_path):
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


def test_a_second_evaluation_leaves_the_page(tmp_path):
    data = CalibrationDataModule(
        texts(), tokenizer(), sequences=4, sequence_length=16, evaluation_sequences=4
    )
    report = Report(folder=str(tmp_path), prompts=["w1"], new_tokens=2)
    trainer = Trainer(**TRAINER, callbacks=[SymPrune(), report])
    module = CausalLMModule(build("llama"))
    trainer.validate(module, datamodule=data, verbose=False)
    before = (tmp_path / "report.html").read_text()
    trainer.validate(module, datamodule=data, verbose=False)
    assert (tmp_path / "report.html").read_text() == before


def small_data():
    sizes = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 4}
    sizes["training_sequences"] = 2
    return CalibrationDataModule(texts(), tokenizer(), **sizes)


def test_an_evaluation_on_the_test_set(tmp_path):
    callbacks = [SymPrune(when="test"), Report(folder=str(tmp_path), prompts=[])]
    trainer = Trainer(**TRAINER)
    module = CausalLMModule(build("llama"))
    metrics = trainer.test(module, datamodule=small_data(), callbacks=callbacks, verbose=False)
    recorded = json.loads((tmp_path / "report.json").read_text())["manifest"]["metrics"]
    assert recorded["pruned"] == pytest.approx(metrics[0])
    assert recorded["dense"].keys() == recorded["pruned"].keys()
    assert recorded["dense"] != recorded["pruned"]


class TrainedLM(CausalLMModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_after_a_fit_an_evaluation_writes_the_page(tmp_path, caplog):
    report = Report(folder=str(tmp_path), prompts=[])
    callbacks = [SymPrune(when="fit_start"), MaskedFinetuning(), report]
    options = {**TRAINER, "max_steps": 1, "limit_val_batches": 1}
    trainer = Trainer(**options, callbacks=callbacks)
    module, data = TrainedLM(build("llama")), small_data()
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    trainer.fit(module, datamodule=data)
    assert "Report writes its page after an evaluation of the pruned model" in caplog.text
    assert not (tmp_path / "report.html").exists()
    metrics = trainer.validate(module, datamodule=data, verbose=False)
    manifest = json.loads((tmp_path / "report.json").read_text())["manifest"]
    assert manifest["metrics"] == {"dense": {}, "pruned": pytest.approx(metrics[0])}
