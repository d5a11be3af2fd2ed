"""The examples run as documented in their first lines."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from symprune_lightning.cli.verify import verify
from tests.texts import write_project

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    write_project(tmp_path)
    return tmp_path


def test_own_project(folder):
    project = example("own_project").main(str(folder / "model"), str(folder / "texts.txt"))
    dense = AutoModelForCausalLM.from_pretrained(folder / "model")
    weights = [
        (p, dense.get_parameter(n)) for n, p in project.model.named_parameters() if "proj" in n
    ]
    assert len(weights) == 14
    for weight, before in weights:
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
        assert not torch.equal(weight[weight != 0], before[weight != 0])


def test_cli_project(monkeypatch):
    cli = example("cli_project").main(["fit", "--config", str(EXAMPLES / "cli_project.yaml")])
    for layer in (cli.model.net[0], cli.model.net[2]):
        zeros = int(layer.in_features * 0.8)
        assert ((layer.weight == 0).sum(1) == zeros).all()
    points, classes = next(iter(cli.datamodule.train_dataloader()))
    assert (cli.model(points).argmax(1) == classes).float().mean() > 0.9


def test_prune_finetune_export(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", str(folder / "model"), str(folder / "out"), "--steps", "3", "--length", "32"],
    )
    module = example("prune_finetune_export")
    module.main()
    assert capsys.readouterr().out.strip().endswith("pruned weights are still zero: True")
    assert all(check.passed for check in verify(str(folder / "out"), perplexity=False))


@pytest.mark.filterwarnings("ignore")
def test_notebook(folder, monkeypatch):
    """Run the cells in order, with a tiny model in place of the one on the Hub."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            code = "".join(cell["source"]).replace("HuggingFaceTB/SmolLM2-135M-Instruct", "./model")
            exec(compile(code, "first_steps.ipynb", "exec"), names)
    assert all(check.passed for check in verify(str(folder / "pruned"), perplexity=False))
