from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from symprune_lightning import cli
from tests.texts import write_project

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SMALL = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 2}


@pytest.fixture
def model(tmp_path):
    write_project(tmp_path)
    return tmp_path


def symprune(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["symprune", *map(str, arguments)])
    cli.main()


def small(folder):
    options = {**SMALL, "dataset": folder / "texts.txt"}
    return [f"--model.pretrained={folder / 'model'}", "--trainer.accelerator=cpu"] + [
        f"--data.{name}={value}" for name, value in options.items()
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_prune(recipe, model, monkeypatch, capsys):
    output = model / "out"
    symprune(monkeypatch, "prune", "--config", recipe, *small(model), "--output", output)
    manifest = json.loads((output / "sparsity_manifest.json").read_text())
    assert manifest["sparsity"] == pytest.approx(0.5, abs=0.02)  # rows are short here
    assert (output / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert f"sparsity: {manifest['sparsity']:.6f} over 14 layers" in printed
    assert f"pruned {manifest['metrics']['pruned']['val_perplexity']:.4f}" in printed
    assert f"checkpoint: {output}" in printed


def test_recipes_differ_in_the_method_only():
    assert len(RECIPES) >= 4
    shared = []
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        recipe["trainer"].pop("callbacks")
        shared.append(recipe)
    assert all(recipe == shared[0] for recipe in shared)


def test_validate_prunes_too(model, monkeypatch, capsys):
    recipe = next(p for p in RECIPES if p.stem == "wanda")
    symprune(monkeypatch, "validate", "--config", recipe, *small(model))
    assert "val_perplexity" in capsys.readouterr().out


def test_methods_by_short_name_and_override(model, monkeypatch):
    recipe = next(p for p in RECIPES if p.stem == "ria-r2dsnot")
    output = model / "out"
    override = ["--trainer.callbacks.init_args.sparsity=0.25", "--output", str(output)]
    symprune(monkeypatch, "prune", "--config", recipe, *small(model), *override)
    manifest = json.loads((output / "sparsity_manifest.json").read_text())
    assert manifest["sparsity"] == 0.25
    assert manifest["settings"]["refine"][0]["name"] == "R2DSnoT"


def test_score_by_string(model, monkeypatch):
    recipe = yaml.safe_load(RECIPES[0].read_text())
    for part in ("model", "data"):
        recipe[part] = str(RECIPES[0].parent / recipe[part])
    recipe["trainer"]["callbacks"] = [
        {
            "class_path": "SymPrune",
            "init_args": {"score": "wanda", "refine": {"re:.*mlp.*": {"class_path": "DSnoT"}}},
        }
    ]
    (model / "own.yaml").write_text(yaml.safe_dump(recipe))
    symprune(
        monkeypatch,
        *("prune", "--config", model / "own.yaml", *small(model), "--output", model / "out"),
    )
    settings = json.loads((model / "out" / "sparsity_manifest.json").read_text())["settings"]
    assert settings["score"]["name"] == "Wanda"
    assert settings["refine"]["re:.*mlp.*"][0]["name"] == "DSnoT"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretrained=./nowhere"], "symprune: no model at nowhere: give a folder"),
        (["--data.sequences=4000"], "symprune: the texts for calibration are too short"),
    ],
)
def test_mistakes_are_one_line(model, monkeypatch, arguments, message):
    with pytest.raises(SystemExit) as error:
        symprune(monkeypatch, "prune", "--config", RECIPES[0], *small(model), *arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_wrong_option_is_not_buried_under_all_the_right_ones(model, monkeypatch, capsys):
    callback = "--trainer.callbacks=NoSuchCallback"
    with pytest.raises(SystemExit):
        symprune(monkeypatch, "prune", "--config", RECIPES[0], *small(model), callback)
    told = capsys.readouterr().err
    assert told.startswith("usage: symprune prune [options]\n")
    assert "NoSuchCallback" in told
    assert "--trainer.accelerator" not in told


def test_the_command_is_installed_and_has_help():
    command = Path(sys.executable).parent / "symprune"
    run = subprocess.run([command, "prune", "--help"], capture_output=True, text=True, check=True)
    assert "--output" in run.stdout


def test_streaming_writes_the_same_weights(model, monkeypatch, capsys):
    recipe = next(path for path in RECIPES if path.stem == "ria-exactswap")
    arguments = ["prune", "--config", recipe, *small(model)]
    symprune(monkeypatch, *arguments, "--output", model / "whole")
    streaming = ["--output", model / "streamed", "--stream", "true", "--json"]
    symprune(monkeypatch, *arguments, *streaming)
    printed = capsys.readouterr().out
    assert "checkpoint: " in printed
    said = json.loads(printed.splitlines()[-1])
    assert said["output"] == str(model / "streamed")
    assert said["seconds"] > 0
    whole, streamed = (
        AutoModelForCausalLM.from_pretrained(model / name).state_dict()
        for name in ("whole", "streamed")
    )
    for name, weight in whole.items():
        assert torch.equal(streamed[name], weight), name
    manifest = json.loads((model / "streamed" / "sparsity_manifest.json").read_text())
    assert manifest["metrics"] == {"dense": {}, "pruned": {}}
    assert (model / "streamed" / "tokenizer.json").is_file()


def test_streaming_needs_somewhere_to_write(model, monkeypatch):
    recipe = next(path for path in RECIPES if path.stem == "wanda")
    with pytest.raises(SystemExit, match="stream needs an output folder"):
        symprune(monkeypatch, "prune", "--config", recipe, *small(model), "--stream", "true")


def test_verify_and_apply(model, monkeypatch, capsys):
    recipe = next(p for p in RECIPES if p.stem == "wanda")
    symprune(monkeypatch, "prune", "--config", recipe, *small(model), "--output", model / "out")
    capsys.readouterr()
    symprune(monkeypatch, "verify", model / "out")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok"] * 7
    again = ["--model", model / "model", "--masks", model / "out", "--output", model / "again"]
    symprune(monkeypatch, "apply", *again)
    symprune(monkeypatch, "verify", model / "again", "--perplexity", "false")
    for folder in ("out", "again"):
        data = (model / folder / "model.safetensors").read_bytes()
        assert data == (model / "out" / "model.safetensors").read_bytes()
    manifest = json.loads((model / "again" / "sparsity_manifest.json").read_text())
    assert manifest["settings"] == {"masks": str(model / "out")}


def test_verify_and_apply_say_what_is_wrong(model, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"symprune: .*is not what it says: manifest"):
        symprune(monkeypatch, "verify", model / "model")
    assert "FAILED  manifest: no sparsity_manifest.json in" in capsys.readouterr().out
    wanted = ["--masks", model / "nowhere", "--output", model / "out"]
    with pytest.raises(SystemExit, match="symprune: no masks at"):
        symprune(monkeypatch, "apply", "--model", model / "model", *wanted)


DYING = """
import os, sys
from tests.killing import dying_at
os.fsync = dying_at(int(sys.argv.pop(1)))(os.fsync)
from symprune_lightning.cli import main
sys.argv[0] = "symprune"
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", "true"])
def test_killed_and_started_again_by_the_same_command(model, stream):
    recipe = next(p for p in RECIPES if p.stem == "ria-r2dsnot")

    def run(output, calls):
        command = [sys.executable, "-c", DYING, str(calls), "prune", "--config", str(recipe)]
        command += [*small(model), "--stream", stream, "--output", str(model / output)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    assert run("whole", 0).returncode == 0
    # in the head of the journal, in a block, in the checkpoint
    for calls in (1, 4, 9):
        killed = run("killed", calls)
        assert killed.returncode == -9, killed.stderr
        assert not (model / "killed").exists()
    assert run("killed", 0).returncode == 0
    for file in (model / "whole").rglob("*.safetensors"):
        written = load_file(model / "killed" / file.relative_to(model / "whole"))
        for name, value in load_file(file).items():
            assert torch.equal(written[name], value), name
    assert not [path.name for path in model.iterdir() if path.name.startswith(".")]


def test_another_method_does_not_go_on_with_what_was_killed(model, monkeypatch):
    recipe = next(p for p in RECIPES if p.stem == "wanda")
    arguments = ["prune", "--config", recipe, *small(model), "--output", model / "out"]
    monkeypatch.setattr("symprune_lightning.trainer.save_checkpoint", _interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        symprune(monkeypatch, *arguments)
    override = "--trainer.callbacks.init_args.sparsity=0.25"
    with pytest.raises(SystemExit, match=r"symprune: .*\.out\.journal is the journal of another"):
        symprune(monkeypatch, *arguments, override)


def _interrupted(*_):
    raise KeyboardInterrupt


def test_a_score_in_the_folder_where_one_is(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_score.py").write_text(
        "from dataclasses import dataclass\n"
        "from symprune_lightning import Magnitude\n"
        "@dataclass(frozen=True)\n"
        "class Least(Magnitude):\n"
        "    power: float = 1.0\n"
        "    def __call__(self, weight, statistics):\n"
        "        return -weight.abs() ** self.power\n"
    )
    recipe = next(p for p in RECIPES if p.stem == "magnitude")
    command = [str(Path(sys.executable).parent / "symprune"), "prune", "--config", str(recipe)]
    command += [*small(model), "--output", str(model / "out")]
    score = "--trainer.callbacks.init_args.score"
    command += [score, "my_score.Least", f"{score}.power", "2"]
    subprocess.run(command, check=True, cwd=folder)
    manifest = json.loads((model / "out" / "sparsity_manifest.json").read_text())
    assert manifest["settings"]["score"] == {"name": "Least", "power": 2.0}


def test_help_is_short(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        symprune(monkeypatch, *arguments)
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 25
        assert "symprune prune --config" in text


@pytest.mark.parametrize("columns", [60, 200])
def test_list_names_all_there_is(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    symprune(monkeypatch, "list")
    text = capsys.readouterr().out
    for name in ("SymWanda", "R2DSnoT", "SparseGPT", "OWL", "NM", "ria-exactswap.yaml"):
        assert name in text
    assert f"recipes in {RECIPES[0].parent}\n" in text
    assert "`" not in text


def test_json_is_all_that_is_said(model, capfd):
    recipe = next(p for p in RECIPES if p.stem == "wanda")
    command = [str(Path(sys.executable).parent / "symprune"), "prune", "--config", str(recipe)]
    command += [*small(model), "--output", str(model / "out"), "--json"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    said = json.loads(run.stdout)
    manifest = json.loads((model / "out" / "sparsity_manifest.json").read_text())
    assert said["sparsity"] == manifest["sparsity"]
    assert said["pruned"] == manifest["metrics"]["pruned"]
    assert said["output"] == str(model / "out")
    assert "Validation" not in run.stderr


def test_a_line_for_each_block_where_nobody_looks_on(model, monkeypatch, capfd):
    recipe = next(p for p in RECIPES if p.stem == "wanda")
    symprune(monkeypatch, "prune", "--config", recipe, *small(model))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pruned ")]
    assert [line.split()[1] for line in lines] == ["7", "14"]
    assert "model.layers.0 " in lines[0]
    assert " tokens/s  " in lines[1]
    assert "GiB" in lines[1]
    symprune(monkeypatch, "prune", "--config", recipe, *small(model), "--quiet")
    captured = capfd.readouterr()
    assert "pruned    7" not in captured.err
    assert captured.out.startswith("sparsity: ")


def test_interrupted_it_says_how_to_go_on(model):
    recipe = next(p for p in RECIPES if p.stem == "ria-exactswap")
    command = [str(Path(sys.executable).parent / "symprune"), "prune", "--config", str(recipe)]
    command += [*small(model), "--output", str(model / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("pruned    7"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    if process.returncode == 0:
        pytest.skip("it was done before it could be interrupted")
    assert "symprune: interrupted; the same command goes on" in rest
    assert "Traceback" not in rest
    assert (model / ".out.journal").is_dir()
    subprocess.run(command, check=True, capture_output=True)
    assert not (model / ".out.journal").exists()


def test_a_traceback_if_asked_for(model, monkeypatch):
    recipe = next(p for p in RECIPES if p.stem == "wanda")
    arguments = ["prune", "--config", recipe, *small(model), "--data.sequences=100000"]
    with pytest.raises(SystemExit, match=r"symprune: the texts for calibration are too short"):
        symprune(monkeypatch, *arguments)
    monkeypatch.setenv("SYMPRUNE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too short"):
        symprune(monkeypatch, *arguments)
