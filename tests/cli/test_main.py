"""The ``symprune`` command: results, errors, interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from symprune_lightning import prune_model
from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.cli.main import error_message
from symprune_lightning.cli.recipes import recipe_files
from tests.cli.commands import INTERRUPTING, interrupt, run_command, small
from tests.texts import texts

RECIPES = sorted(recipe_files())


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_prune(recipe, project, symprune, capsys):
    output = project / "out"
    options = small(project)
    if recipe == "max":
        options = [*options, "--data.training_sequences=4", "--trainer.max_steps=2"]
    if recipe == "wanda-c4":
        options.append("--data.evaluation=null")
    symprune("prune", "--config", recipe, *options, "--output", output)
    manifest = read_manifest(output)
    assert manifest["sparsity"] == pytest.approx(0.5, abs=0.02)  # rows are short here
    assert (output / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert f"sparsity: {manifest['sparsity']:.6f} over 14 layers" in printed
    assert f"pruned {manifest['metrics']['pruned']['val_perplexity']:.4f}" in printed
    assert f"checkpoint: {output}" in printed


@pytest.mark.parametrize("command", ["validate", "test"])
def test_commands_that_do_not_train_refuse_distillation(command, project, symprune):
    options = [*small(project), "--data.training_sequences=4"]
    with pytest.raises(SystemExit, match=f"{command} does not train, so Distillation would have"):
        symprune(command, "--config", "max", *options)


def test_validate_prunes_too(project, symprune, capsys):
    metrics = []
    for sparsity in (0.0, 0.9):
        options = [f"--pruning.sparsity={sparsity}", "--pruning.baseline=false"]
        symprune("validate", "--config", "wanda", *small(project), *options)
        lines = capsys.readouterr().out.splitlines()
        metrics += [line for line in lines if line.startswith("val_perplexity")]
    assert len(metrics) == 2
    assert metrics[0] != metrics[1]


def test_fit_keeps_zeros(project, symprune, monkeypatch):
    (project / "tune.yaml").write_text(
        "trainer: {max_epochs: 1, logger: false, enable_checkpointing: false,\n"
        "  callbacks: [symprune_lightning.MaskedFinetuning, check_zeros.CheckZeros]}\n"
        "data: {training_sequences: 4}\n"
        "pruning: {sparsity: 0.5, when: fit_start}\n"
    )
    (project / "check_zeros.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class CheckZeros(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        zeros = [(p == 0).float().mean() for n, p in module.named_parameters()\n"
        "                 if n.endswith('proj.weight')]\n"
        f"        with open({str(project / 'zeros.txt')!r}, 'w') as file:\n"
        "            print(len(zeros), float(min(zeros)), file=file)\n"
    )
    monkeypatch.syspath_prepend(project)
    symprune("fit", "--config", project / "tune.yaml", *small(project))
    assert (project / "zeros.txt").read_text() == "14 0.5\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretrained=./nowhere"], "symprune: no model at nowhere: expected a folder"),
        (["--data.sequences=4000"], "symprune: the texts for calibration are too short"),
        (["--pruning.sparsity=1.5"], "symprune: sparsity is 1.5, but "),
        (
            ["--pruning.score=wander"],
            "symprune: no Score is called 'wander' (did you mean Wanda?); choose",
        ),
    ],
)
def test_user_errors_are_one_line(project, symprune, arguments, message):
    with pytest.raises(SystemExit) as error:
        symprune("prune", "--config", "ria", *small(project), *arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe(project, symprune):
    with pytest.raises(SystemExit) as error:
        symprune("prune", "--config", "wander", *small(project))
    assert str(error.value).startswith(
        "symprune: there is no file or recipe wander (did you mean wanda?); the recipes"
    )
    assert all(recipe in str(error.value) for recipe in RECIPES)


def test_help_is_a_command_too(symprune, capsys):
    symprune("help")
    assert capsys.readouterr().out.startswith("usage: symprune COMMAND")
    symprune("help", "prune")
    assert "--sparsity FRACTION" in capsys.readouterr().out


def test_a_mapping_that_is_cut_off(project, symprune):
    options = ["--data.evaluation", '{"same": null, "other": ']
    with pytest.raises(SystemExit, match="neither valid JSON nor YAML"):
        symprune("prune", "--config", "ria", *small(project), *options)


def test_an_invalid_option_is_reported_without_the_list_of_options(project, symprune, capsys):
    with pytest.raises(SystemExit):
        symprune("prune", "--config", "ria", *small(project), "--trainer.callbacks=NoSuchCallback")
    error = capsys.readouterr().err
    assert error == (
        "symprune: --trainer.callbacks is 'NoSuchCallback', which is no list or NoneType\n"
    )


def test_an_error_of_the_model_names_the_batch():
    layers = torch.nn.Sequential(torch.nn.Linear(32, 8))
    with pytest.raises(ValueError, match="features") as raised:
        prune_model(layers, [torch.ones(2, 16)])
    message = error_message(raised.value)
    assert message.startswith("the input of layer 0 has 16 features, and its weight 32")
    assert "while the model ran on a calibration batch: " in message
    assert "(2, 16)" in message
    assert "\n" not in message


def test_tracebacks_on_request(project, symprune, monkeypatch):
    arguments = ["prune", "--config", "wanda", *small(project), "--data.sequences=100000"]
    with pytest.raises(SystemExit, match=r"symprune: the texts for calibration are too short"):
        symprune(*arguments)
    monkeypatch.setenv("SYMPRUNE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too short"):
        symprune(*arguments)


def test_help_is_short(symprune, capsys):
    for arguments in ([], ["--help"], ["-h"]):
        symprune(*arguments)
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 25
        assert "symprune prune --config" in text


def test_help_imports_neither_torch_nor_lightning():
    code = (
        "import sys\n"
        "from symprune_lightning.cli.main import main\n"
        "sys.argv = ['symprune', '--help']\n"
        "main()\n"
        "print({'torch', 'lightning', 'transformers'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: symprune COMMAND")
    assert run.stdout.splitlines()[-1] == "set()"


def test_the_installed_command_lists_its_options():
    run = run_command("prune", "--help")
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) < 60
    for option in ("--output", "--stream", "--score", "--sparsity", "--data.dataset", "--json"):
        assert f" {option}" in run.stdout


def test_options_of_the_pruning_method_are_listed(symprune, capsys):
    with pytest.raises(SystemExit) as stop:
        symprune("prune", "--pruning.help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("score", "sparsity", "pattern", "refine", "solver", "calibration_order"):
        assert f" --pruning.{option} " in text


def test_streaming_writes_the_same_weights(project, symprune, capsys):
    arguments = ["prune", "--config", "ria-exactswap", *small(project)]
    symprune(*arguments, "--output", project / "in-memory")
    symprune(*arguments, "--output", project / "streamed", "--stream", "true", "--json")
    printed = capsys.readouterr().out
    assert "checkpoint: " in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["output"] == str(project / "streamed")
    assert result["seconds"] > 0
    expected, streamed = (
        AutoModelForCausalLM.from_pretrained(project / name).state_dict()
        for name in ("in-memory", "streamed")
    )
    for name, weight in expected.items():
        assert torch.equal(streamed[name], weight), name
    assert read_manifest(project / "streamed")["metrics"] == {"dense": {}, "pruned": {}}
    assert (project / "streamed" / "tokenizer.json").is_file()


def test_streaming_needs_an_output(project, symprune):
    with pytest.raises(SystemExit, match="stream=True needs an output folder"):
        symprune("prune", "--config", "wanda", *small(project), "--stream", "true")


def test_json_is_the_only_output(project):
    output = project / "out"
    run = run_command("prune", "--config", "wanda", *small(project), "--output", output, "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    manifest = read_manifest(output)
    assert result["sparsity"] == manifest["sparsity"]
    assert result["dense"] == manifest["metrics"]["dense"]
    assert result["pruned"] == manifest["metrics"]["pruned"]
    assert result["output"] == str(output)
    assert "Validation" not in run.stderr


def test_one_line_per_block_without_a_terminal(project, symprune, capfd):
    symprune("prune", "--config", "wanda", *small(project))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pruned ")]
    assert [line.split()[1] for line in lines] == ["7", "14"]
    assert "model.layers.0 " in lines[0]
    assert " tokens/s  " in lines[1]
    assert "GiB" in lines[1]
    symprune("prune", "--config", "wanda", *small(project), "--quiet")
    captured = capfd.readouterr()
    assert captured.out.startswith("sparsity: ")
    # nor progress bars of loading and writing, nor advertisements
    assert not captured.err.strip()


def test_classes_in_the_current_directory(project, tmp_path_factory):
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
    score = ["--pruning.score", "my_score.Least", "--pruning.score.power", "2"]
    output = ["--output", project / "out"]
    run = run_command(
        "prune", "--config", "magnitude", *small(project), *output, *score, cwd=folder
    )
    assert run.returncode == 0, run.stderr
    assert read_manifest(project / "out")["settings"]["score"] == {"name": "Least", "power": 2.0}


PRUNING_CALLBACK = """
from symprune_lightning import Magnitude, PruningCallback, PruningMethod, prune_with


class Own(PruningCallback):
    def __init__(self, sparsity: float = 0.5):
        super().__init__()
        self.sparsity = sparsity

    @property
    def settings(self):
        return {"own": self.sparsity}

    def prune(self, model, batches, fraction, options):
        return prune_with(model, batches, PruningMethod(Magnitude(), self.sparsity), options)
"""


def test_a_pruning_callback_of_the_user(project, symprune, monkeypatch):
    (project / "own_callback.py").write_text(PRUNING_CALLBACK)
    (project / "own.yaml").write_text(
        "trainer:\n"
        "  callbacks: [{class_path: own_callback.Own, init_args: {sparsity: 0.25}}]\n"
        "  logger: false\n"
        "  enable_checkpointing: false\n"
    )
    monkeypatch.chdir(project)
    arguments = ["prune", "--config", "own.yaml", *small(project), "--output", "out"]
    with pytest.raises(SystemExit, match=r"exactly one pruning callback .* there are 2"):
        symprune(*arguments)
    symprune(*arguments, "--pruning", "null")
    manifest = read_manifest(project / "out")
    assert manifest["settings"] == {"own": 0.25}
    assert manifest["sparsity"] == 0.25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_resumed(project, number):
    (project / "interrupting.py").write_text(INTERRUPTING)
    arguments = ["prune", "--config", "ria-exactswap", *small(project), "--output", project / "out"]
    run = run_command(*arguments, *interrupt(layer=9, number=number), cwd=project)
    assert run.returncode == 128 + number
    last = run.stderr.strip().splitlines()[-1]
    assert last == "symprune: interrupted; rerun the same command to resume"
    assert "Traceback" not in run.stderr
    assert (project / ".out.journal" / "block-00000.safetensors").is_file()
    assert not (project / "out").exists()
    run = run_command(*arguments)
    assert run.returncode == 0, run.stderr
    assert "7 of 14 layers are recorded" in " ".join(run.stderr.split())
    assert not (project / ".out.journal").exists()
    assert read_manifest(project / "out")["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_sigterm_ends_all_ranks_after_the_same_layer(project):
    (project / "interrupting.py").write_text(INTERRUPTING)
    arguments = ["prune", "--config", "ria", *small(project), "--output", project / "out"]
    ranks = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    run = run_command(*arguments, *ranks, *interrupt(9, signal.SIGTERM), cwd=project)
    assert run.returncode == 128 + signal.SIGTERM
    assert run.stderr.count("symprune: interrupted; rerun the same command to resume") == 2
    assert "Traceback" not in run.stderr
    run = run_command(*arguments)
    assert run.returncode == 0, run.stderr
    assert read_manifest(project / "out")["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_interrupted_without_output_nothing_can_be_resumed(project, symprune, monkeypatch, capsys):
    (project / "interrupting.py").write_text(INTERRUPTING)
    monkeypatch.syspath_prepend(project)
    with pytest.raises(SystemExit) as stop:
        symprune("prune", "--config", "wanda", *small(project), *interrupt(layer=2))
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "symprune: interrupted"


@pytest.fixture
def journal(project, symprune, monkeypatch):
    """The journal of a run that was interrupted in its second block."""
    (project / "interrupting.py").write_text(INTERRUPTING)
    monkeypatch.syspath_prepend(project)
    arguments = ["prune", "--config", "wanda", *small(project), "--output", project / "out"]
    with pytest.raises(SystemExit, match="130"):
        symprune(*arguments, *interrupt(layer=9))
    return arguments, project / ".out.journal"


def test_another_method_does_not_resume(journal, symprune):
    arguments, folder = journal
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SystemExit, match=r"symprune: .*\.out\.journal is the journal of another"):
        symprune(*arguments, "--pruning.sparsity=0.25")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_journal_of_another_format_version(journal, symprune, version):
    arguments, folder = journal
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded.pop("format_version") == 1
    if version is not None:
        recorded["format_version"] = version
    (folder / "run.json").write_text(json.dumps(recorded))
    with pytest.raises(SystemExit, match=r"reads format 1: resume .* or delete the folder"):
        symprune(*arguments)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    symprune(*arguments)


DYING = """
import os, sys
from tests.killing import dying_at
os.fsync = dying_at(int(sys.argv.pop(1)))(os.fsync)
from symprune_lightning.cli.main import main
sys.argv[0] = "symprune"
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_killed_run_is_resumed_by_the_same_command(project, symprune, stream):
    arguments = [
        "prune",
        "--config",
        "ria-r2dsnot",
        *small(project),
        "--stream",
        stream,
        "--output",
    ]

    def run(output, calls):
        command = [sys.executable, "-c", DYING, str(calls), *arguments, str(project / output)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    symprune(*arguments, project / "expected")
    # while writing the journal's header, a block, the checkpoint
    for calls in (1, 4, 9):
        killed = run("killed", calls)
        assert killed.returncode == -9, killed.stderr
        assert not (project / "killed").exists()
    assert run("killed", 0).returncode == 0
    files = list((project / "expected").rglob("*.safetensors"))
    assert files
    for file in files:
        written = load_file(project / "killed" / file.relative_to(project / "expected"))
        for name, value in load_file(file).items():
            assert torch.equal(written[name], value), name
    assert not [path.name for path in project.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("command", "when"), [("test", "validate"), ("validate", "fit_start")])
def test_an_evaluation_that_prunes_nothing_is_refused(command, when, project, symprune):
    with pytest.raises(SystemExit, match=f"{command} prunes nothing with when='{when}'"):
        symprune(command, "--config", "ria", *small(project), "--when", when)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_result_of_an_evaluation_as_json(command, project, symprune, capsys):
    symprune(command, "--config", "ria", *small(project), "--when", command, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["dense"].keys() == result["pruned"].keys()
    assert result["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--group", "nope"],
            "--group is 'nope'; choose one of output, input, layer, block, model",
        ),
        (["--when", "nope"], "--when is 'nope'; choose one of validate, test, fit_start, fit_end"),
        (["--experts", "nope"], "--experts is 'nope'; choose one of routed, all"),
        (["--sparsity"], "--sparsity needs a value"),
        (["--sparsity", "--quiet"], "--sparsity needs a value"),
        (["--score={class_path: RIAA}"], "--score: there is no class RIAA: did you mean RIA?"),
        (["--data.tokenizer", "x"], "--data.tokenizer is that of --model.pretrained, and cannot"),
        (
            ["--data.dataset.colum", "body"],
            "there is no option --data.dataset.colum: did you mean --data.dataset.column?",
        ),
    ],
)
def test_a_mistake_is_one_sentence(project, symprune, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        symprune("prune", "--config", "ria", *small(project), *arguments)
    printed = capsys.readouterr().err + f"symprune: {stop.value.code}"
    assert f"symprune: {message}" in printed
    assert "Traceback" not in printed
    assert "Subtypes" not in printed


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "the recipe is no mapping"),
        ("prunning: {score: ria}", "there is no option --prunning.score: did you mean"),
    ],
)
def test_a_recipe_that_is_none(project, symprune, capsys, recipe, message):
    (project / "recipe.yaml").write_text(recipe)
    with pytest.raises(SystemExit, match="2"):
        symprune("prune", *small(project), "--config", project / "recipe.yaml")
    assert f"symprune: {message}" in capsys.readouterr().err


def test_layers_that_are_ignored_twice(project, symprune, capsys):
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "down")]
    options = [option for name in names for option in ("--ignore", name)]
    symprune("prune", "--config", "ria", *small(project), *options, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 12
    assert 0.7 < result["coverage"] < 0.8
    symprune("prune", "--config", "ria", *small(project), *options, "--quiet")
    assert "coverage: 77.8% of the weights of the blocks" in capsys.readouterr().out


def test_quiet_runs_warn_of_what_their_result_does_not_show(project):
    options = [*small(project), "--quiet", "--score", "OutputWanda"]
    done = run_command("validate", "--config", "ria", *options)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("symprune: warning: OutputWanda() differs only") for line in lines)


def test_without_a_baseline_the_pruned_metrics_are_printed(project, symprune, capsys):
    symprune("prune", "--config", "ria", *small(project), "--baseline", "false", "--quiet")
    assert "val_perplexity: pruned " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_without_batches_is_an_error(project, symprune):
    options = [*small(project), "--trainer.limit_val_batches", "0"]
    with pytest.raises(SystemExit, match="nothing was pruned, because no batch was evaluated"):
        symprune("validate", "--config", "ria", *options)


def test_a_fit_says_what_it_has_written(project, symprune, capsys):
    options = [*small(project), "--when", "fit_start", "--data.training_sequences=4"]
    options += ["--trainer.max_steps=1", "--quiet"]
    options += ["--trainer.callbacks+=symprune_lightning.MaskedFinetuning"]
    symprune("fit", "--config", "ria", *options)
    printed = capsys.readouterr().out
    assert "sparsity: 0.500000 over 14 layers" in printed
    assert "nothing was written: --trainer.enable_checkpointing true" in printed
    options += ["--trainer.enable_checkpointing=true", f"--trainer.default_root_dir={project}"]
    symprune("fit", "--config", "ria", *options)
    (written,) = project.rglob("*.ckpt")
    assert f"checkpoint: {written}" in capsys.readouterr().out


def test_a_printed_configuration_is_a_recipe(project, symprune, capsys):
    (project / "other.txt").write_text("\n\n".join(texts(80)[40:]))
    sets = {"same": None, "other": str(project / "other.txt")}
    options = [*small(project), f"--data.evaluation={json.dumps(sets)}"]
    with pytest.raises(SystemExit, match="0"):
        symprune("prune", "--config", "ria", *options, "--print_config")
    (project / "printed.yaml").write_text(capsys.readouterr().out)
    symprune("prune", "--config", project / "printed.yaml", "--json")
    metrics = json.loads(capsys.readouterr().out)["pruned"]
    assert {"val_perplexity/same", "val_perplexity/other"} <= metrics.keys()


def test_a_run_that_is_refused_leaves_no_journal(project, symprune):
    options = [*small(project), "--output", project / "out"]
    wrong = [*options, "--score", "gradientwanda", "--group", "layer", "--stream", "true"]
    with pytest.raises(SystemExit, match="cannot be combined with streaming"):
        symprune("prune", "--config", "ria", *wrong)
    assert not (project / ".out.journal").exists()
    symprune("prune", "--config", "ria", *options)
    assert (project / "out" / "model.safetensors").is_file()


def test_an_incomplete_checkpoint_is_not_pruned(project, symprune):
    weights = load_file(project / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, project / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"lacks 1 of the weights of .*layers.1.mlp.up_proj"):
        symprune("prune", "--config", "ria", *small(project))


def test_a_packed_copy_is_not_pruned(project, symprune, capsys):
    symprune("prune", "--config", "ria", *small(project), "--output", project / "out")
    symprune("pack", project / "out", project / "packed")
    options = [*small(project), f"--model.pretrained={project / 'packed'}"]
    with pytest.raises(SystemExit, match="is a packed copy: restore the checkpoint first"):
        symprune("prune", "--config", "ria", *options)
    with pytest.raises(SystemExit, match="holds another checkpoint: choose a new folder"):
        symprune("pack", project / "packed", project / "out")


def test_a_part_of_the_evaluation_is_not_verified(project, symprune, capsys):
    options = [*small(project), "--trainer.limit_val_batches=0.5", "--data.batch_size=1"]
    symprune("prune", "--config", "ria", *options, "--output", project / "out")
    capsys.readouterr()
    symprune("verify", project / "out")
    assert "--  perplexity: not checked: the recorded one is that of a part" in (
        capsys.readouterr().out.replace("    ", "")
    )


def test_compare_has_no_json(project, symprune, capsys):
    with pytest.raises(SystemExit, match="2"):
        symprune("compare", "ria", "--output", project / "out", "--json")
    assert "compare has no --json: see" in capsys.readouterr().err
