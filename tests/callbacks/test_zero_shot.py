"""Tasks of lm-evaluation-harness, on a task defined here with local data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune, Trainer, ZeroShot
from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.cli.main import main
from tests.models import build
from tests.texts import texts, tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "wanda.yaml"
TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
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


@pytest.fixture
def accuracy(folder):
    """Accuracy of a model as computed by the harness itself."""
    manager = TaskManager(include_path=str(folder))

    def evaluate(model, **options):
        harness_model = HFLM(pretrained=model.eval(), tokenizer=tokenizer(), batch_size=1)
        results = simple_evaluate(
            model=harness_model, tasks=["words"], task_manager=manager, bootstrap_iters=0, **options
        )
        return results["results"]["words"]["acc,none"]

    return evaluate


def varied_model():
    """A model whose layers have enough influence that pruning changes its answers."""
    model = build("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(20 if "_proj" in name else 1)
    return model


def run(folder, *callbacks):
    data = CalibrationDataModule(
        texts(), tokenizer(), sequences=4, sequence_length=16, evaluation_sequences=4
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", **quiet)
    module = CausalLMModule(varied_model())
    trainer.prune(module, datamodule=data, output=str(folder / "out"), callbacks=list(callbacks))
    return read_manifest(folder / "out")["metrics"]


@pytest.mark.filterwarnings("ignore")
def test_metrics_of_both_models_equal_those_of_the_harness(folder, accuracy):
    tasks = ZeroShot(["words"], include_path=str(folder))
    metrics = run(folder, tasks, SymPrune("magnitude", sparsity=0.95))
    dense = accuracy(varied_model())
    pruned = accuracy(AutoModelForCausalLM.from_pretrained(folder / "out"))
    assert dense != pruned
    assert metrics["dense"]["words/acc"] == pytest.approx(dense, abs=1e-6)
    assert metrics["pruned"]["words/acc"] == pytest.approx(pruned, abs=1e-6)
    assert all("val_perplexity" in metrics[name] for name in ("dense", "pruned"))
    assert "words/acc" in (folder / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_limit_and_few_shot_are_those_of_the_harness(folder, accuracy):
    options = {"limit": 7, "few_shot": 2}
    tasks = ZeroShot(["words"], include_path=str(folder), batch_size=3, **options)
    metrics = run(folder, tasks, SymPrune("magnitude"))
    expected = accuracy(varied_model(), limit=7, num_fewshot=2)
    assert expected not in (accuracy(varied_model()), accuracy(varied_model(), limit=7))
    assert metrics["dense"]["words/acc"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_eval_command(folder, accuracy, monkeypatch, capsys):
    build("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n\n".join(texts()))
    command = ["symprune", "eval", "--tasks", "words", "--limit", "6", "--config", str(RECIPE)]
    command += ["--include_path", str(folder), f"--model.pretrained={folder / 'model'}"]
    sizes = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 2}
    command += [f"--data.{name}={size}" for name, size in sizes.items()]
    command += [f"--data.dataset={folder / 'texts.txt'}", "--json"]
    monkeypatch.setattr("sys.argv", [*command, f"--output={folder / 'out'}"])
    main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, path in (("dense", "model"), ("pruned", "out")):
        expected = accuracy(AutoModelForCausalLM.from_pretrained(folder / path), limit=6)
        assert printed[name]["words/acc"] == pytest.approx(expected, abs=1e-6)
    assert printed["output"] == str(folder / "out")
    command[3] = "nowhere"
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="symprune: lm-evaluation-harness has no task 'nowhere'"):
        main()


@pytest.mark.filterwarnings("ignore")
def test_invalid_tasks_are_refused(folder):
    with pytest.raises(ValueError, match=r"tasks is empty: pass at least one"):
        ZeroShot([])
    with pytest.raises(ValueError, match="has no task 'nowhere'"):
        run(folder, ZeroShot(["nowhere"], include_path=str(folder)), SymPrune("magnitude"))
    assert not (folder / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_several_processes_are_refused():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(ValueError, match="ZeroShot runs on one process: use devices=1"):
        ZeroShot(["words"]).setup(trainer, CausalLMModule(build("llama")), "validate")
