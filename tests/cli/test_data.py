"""``symprune data`` shows what a recipe would feed to the model, without loading it."""

from __future__ import annotations

import json

import pytest

from symprune_lightning.data.datamodule import CalibrationDataModule
from tests.cli.commands import SIZES, small
from tests.texts import texts, tokenizer


def test_the_sequences_of_a_recipe(project, symprune, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for file in (project / "model").glob("*.safetensors"):
        file.unlink()  # the weights are not needed
    symprune("data", "--config", "wanda", *small(project))
    shown = capsys.readouterr().out
    data = CalibrationDataModule(str(project / "texts.txt"), tokenizer(), seed=0, **SIZES)
    for split, digest in data.hashes.items():
        assert split in shown
        assert digest[:12] in shown
    assert f"{SIZES['sequences'] * SIZES['sequence_length']:,}" in shown
    first = next(iter(data.calibration_dataloader()))["input_ids"][0]
    assert tokenizer().decode(first)[:40] in shown.replace("\n", " ")
    assert any(text[:20] in shown for text in texts())


def test_sampled_data_cannot_be_shown(project, symprune):
    arguments = ["--config", "wanda", *small(project), "--data.dataset=self"]
    with pytest.raises(SystemExit, match="dataset='self' is sampled from the model"):
        symprune("data", *arguments, f"--data.evaluation={project / 'texts.txt'}")


def test_json(project, symprune, capsys):
    symprune("data", "--config", "ria", *small(project), "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["dataset"] == str(project / "texts.txt")
    assert printed["sha256"].keys() == {"calibration", "evaluation"}
