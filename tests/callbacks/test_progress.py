"""Progress of a run on the terminal and in logs, and the summary tables."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from symprune_lightning import BlockReconstruction
from symprune_lightning.callbacks.progress import progress_hooks, summary
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.trainer import Trainer
from tests.models import batches, build


def rendered(tables) -> str:
    console = Console(file=io.StringIO(), width=100)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_summary_has_a_row_for_each_layer_type_and_metric():
    result = prune_model(build("llama"), batches(), score="wanda", refine="dsnot")
    text = rendered(summary(result, {"val_perplexity": 10.5}, {"val_perplexity": 20.25, "n": 1.0}))
    lines = {line.split()[1]: line.split() for line in text.splitlines() if len(line.split()) > 6}
    assert {"q_proj", "down_proj", "all"} <= set(lines)
    assert lines["q_proj"][3] == "2"
    assert lines["up_proj"][7] == "0.5000"
    assert "10.5000" in text
    assert "20.2500" in text
    row = next(line for line in text.splitlines() if " n " in line)
    assert "–" in row


def test_summary_without_statistics_or_metrics():
    result = prune_model(build("llama"), [], score="magnitude")
    tables = summary(result, {}, {})
    assert len(tables) == 1
    assert "–" in rendered(tables)


def trainer(**options) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


def prune_with_progress(progress: Trainer) -> None:
    with progress_hooks(progress) as hooks:
        prune_model(build("llama"), batches(), score="wanda", hooks=hooks)


def final_screen(output: str) -> str:
    """Text that remains on a terminal: interprets \\r, \\n, cursor up and erase line."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", output):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", token):
            row -= int(match.group(1) or 1)
        elif not token.startswith("\x1b"):
            lines[row] = (
                lines[row].ljust(column)[:column] + token + lines[row][column + len(token) :]
            )
            column += len(token)
    return "\n".join(lines).strip()


@pytest.fixture
def terminal(monkeypatch):
    """Make rich draw as on a terminal, wide enough for one line."""
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)


def without_escapes(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)


@pytest.mark.usefixtures("terminal")
def test_the_bar_on_a_terminal_shows_every_layer_and_is_erased(capsys):
    progress = trainer()
    capsys.readouterr()
    with progress_hooks(progress) as hooks:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        prune_model(model, [torch.randn(4, 8)], hooks=hooks)
    output = capsys.readouterr().out
    text = without_escapes(output)
    assert re.search(r"pruning .*2/2 .*\b1 .*tokens/s .*GiB", text)
    assert final_screen(output) == ""


def test_a_log_has_a_line_for_each_block(capsys):
    progress = trainer()
    capsys.readouterr()
    prune_with_progress(progress)
    output = capsys.readouterr()
    assert output.out == ""
    result = prune_model(build("llama"), batches(), score="wanda")
    lines = output.err.splitlines()
    assert len(lines) == 2
    for index, line in enumerate(lines):
        block = result.layers[7 * index : 7 * (index + 1)]
        mean = sum(report.error_refined for report in block) / 7
        assert re.match(
            rf"pruned +{7 * (index + 1)} of 14 layers  model\.layers\.{index} +error {mean:.5f}  "
            r"\d+ s, \d+ s left  [\d,]+ tokens/s  \d+\.\d\d GiB",
            line,
        ), line


class Fails(PruningHooks):
    """Ends a run in its second block."""

    def on_layer_pruned(self, report, mask):
        if report.name == "model.layers.1.mlp.up_proj":
            raise RuntimeError("the end")


def test_a_resumed_run_has_lines_for_its_own_blocks(tmp_path, capsys):
    options = {"score": "wanda", "journal": tmp_path / "journal"}
    with pytest.raises(RuntimeError, match="the end"):
        prune_model(build("llama"), batches(), hooks=[Fails()], **options)
    progress = trainer()
    capsys.readouterr()
    with progress_hooks(progress) as hooks:
        prune_model(build("llama"), batches(), hooks=hooks, **options)
    resuming, *lines = capsys.readouterr().err.splitlines()
    assert resuming.endswith("7 of 14 layers are recorded")
    (line,) = lines
    assert line.startswith("pruned   14 of 14 layers  model.layers.1 ")


def test_a_summary_without_a_refiner_has_no_column_for_it():
    for refine in (None, "dsnot"):
        result = prune_model(build("llama"), batches(), score="wanda", refine=refine)
        headings = rendered(summary(result, {}, {})).splitlines()[2]
        assert ("refined" in headings) == (refine is not None)


RECONSTRUCTED: dict[str, Any] = {
    "calibration_order": "block",
    "reconstruct": BlockReconstruction(epochs=2, learning_rate=1e-2),
}


def test_a_log_has_a_line_for_each_reconstructed_block(capsys):
    progress = trainer()
    capsys.readouterr()
    with progress_hooks(progress) as hooks:
        result = prune_model(build("llama"), batches(), hooks=hooks, **RECONSTRUCTED)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4, "one line when a block is pruned, one when it is reconstructed"
    for index, report in enumerate(result.blocks):
        assert lines[2 * index].startswith(f"pruned {7 * (index + 1):>4} of 14 layers")
        assert re.match(
            rf"reconstructed {re.escape(report.name)} +held-out error {report.error:.5f} to "
            rf"{report.error_reconstructed:.5f}  2 epochs, \d+ s$",
            lines[2 * index + 1],
        )


@pytest.mark.usefixtures("terminal")
def test_the_bar_shows_block_epoch_and_error(capsys):
    progress = trainer()
    capsys.readouterr()
    with progress_hooks(progress) as hooks:
        bar = hooks[0]
        bar.on_reconstruction_epoch("model.layers.3", 2, 0.0125)
    text = without_escapes(capsys.readouterr().out)
    assert "reconstructing model.layers.3, epoch 2, held-out error 0.01250" in text


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_no_output_without_progress_bars(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    progress = trainer(enable_progress_bar=False)
    capsys.readouterr()
    prune_with_progress(progress)
    assert capsys.readouterr() == ("", "")
