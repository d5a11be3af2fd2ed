"""Tasks of lm-evaluation-harness, on a task of our own from local data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune, Trainer
from symprune_lightning.cli import main
from symprune_lightning.checkpoints.export import MANIFEST
from symprune_lightning.callbacks.zero_shot import ZeroShot
from tests.models import build
from tests.texts import texts, tokenizer

RECIPE = Path(__file__).parent.parent / "recipes" / "wanda.yaml"
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"question": f"w{i}", "choices": [f"w{(i * k) % 59}" for k in (3, 7, 11)], "answer": i % 3}
        for i in range(48)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


def run(folder, *callbacks, **options):
    data = CalibrationDataModule(
        texts(), tokenizer(), sequences=4, sequence_length=16, evaluation_sequences=4
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", **quiet, **options)
    model = build("llama")
    with torch.no_grad():  # as it is, its layers have no say in what comes next
        for name, weight in model.named_parameters():
            weight.mul_(20 if "_proj" in name else 1)
    module = CausalLMModule(model)
    trainer.prune(module, datamodule=data, output=str(folder / "out"), callbacks=list(callbacks))
    return json.loads((folder / "out" / MANIFEST).read_text())["metrics"]


@pytest.mark.filterwarnings("ignore")
def test_before_and_after_are_in_the_manifest(folder):
    tasks = ZeroShot(["words"], include_path=str(folder))
    metrics = run(folder, tasks, SymPrune("magnitude", sparsity=0.95))
    for which in ("dense", "pruned"):
        assert 0 <= metrics[which]["words/acc"] <= 1
        right = metrics[which]["words/acc"] * 48
        assert right == pytest.approx(round(right), abs=1e-3)
        assert "val_perplexity" in metrics[which]
    assert metrics["dense"]["words/acc"] != metrics["pruned"]["words/acc"]
    assert "words/acc" in (folder / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_eval_command(folder, monkeypatch, capsys):
    build("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n\n".join(texts()))
    command = ["symprune", "eval", "--tasks", "words", "--limit", "6", "--config", str(RECIPE)]
    command += ["--include_path", str(folder), f"--model.pretrained={folder / 'model'}"]
    sizes = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 2}
    command += [f"--data.{name}={size}" for name, size in sizes.items()]
    command += [f"--data.dataset={folder / 'texts.txt'}", "--json"]
    monkeypatch.setattr("sys.argv", command)
    main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    for which in ("dense", "pruned"):
        assert said[which]["words/acc"] * 6 == pytest.approx(round(said[which]["words/acc"] * 6))
    assert said["output"] is None
    command[3] = "nowhere"
    with pytest.raises(SystemExit, match="symprune: lm-evaluation-harness has no task 'nowhere'"):
        main()


@pytest.mark.filterwarnings("ignore")
def test_few_examples(folder):
    metrics = run(
        folder, ZeroShot(["words"], include_path=str(folder), limit=3), SymPrune("magnitude")
    )
    assert metrics["dense"]["words/acc"] * 3 == pytest.approx(
        round(metrics["dense"]["words/acc"] * 3), abs=1e-4
    )


@pytest.mark.filterwarnings("ignore")
def test_says_what_is_wrong(folder):
    with pytest.raises(ValueError, match="there are no tasks"):
        ZeroShot([])
    with pytest.raises(ValueError, match="has no task 'nowhere'"):
        run(folder, ZeroShot(["nowhere"], include_path=str(folder)), SymPrune("magnitude"))
