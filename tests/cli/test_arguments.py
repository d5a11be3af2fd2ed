"""Short options, and one sentence for each mistake on the command line."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

from symprune_lightning import C4, SymPrune, TextSource
from symprune_lightning.callbacks.pruning import find_pruning_callback
from symprune_lightning.cli.arguments import SOURCE_SETTINGS, check_arguments, expand
from symprune_lightning.cli.help import METHOD, OPTIONS, PRUNE_HELP, SUMMARIES
from symprune_lightning.cli.parser import instantiate
from symprune_lightning.functional.refiners import ExactSwap
from tests.cli.commands import small
from tests.texts import texts


def test_the_options_that_are_known_without_torch():
    """The help has a copy of them, since importing SymPrune takes seconds."""
    assert set(METHOD) == set(inspect.signature(SymPrune).parameters)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hlp", "there is no option --hlp: did you mean --help?"),
        ("--sparsty=0.5", "there is no option --sparsty: did you mean --sparsity?"),
        ("--zzz.x", "there is no option --zzz; see --help all"),
    ],
)
def test_unknown_options_are_refused_before_anything_is_imported(argument, message):
    code = "import sys; from symprune_lightning.cli.main import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", code, "prune", "--config", "ria", argument]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert f"symprune: {message}" in run.stderr
    assert "| torch" not in run.stderr
    assert run.returncode == 2


def test_an_unknown_recipe_is_refused_before_anything_is_imported():
    code = "import sys; from symprune_lightning.cli.main import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", code, "prune", "--config", "riaa"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "there is no file or recipe riaa (did you mean ria?)" in run.stderr
    assert "| torch" not in run.stderr


def test_texts_that_begin_like_an_option_are_values():
    check_arguments(
        ["--trainer.callbacks+=Report", "--ignore+", "a", "-c", "ria", "--a text, no option"]
    )


def test_a_recipe_is_missing():
    with pytest.raises(ValueError, match="--config needs the name of a recipe"):
        check_arguments(["--sparsity", "0.5", "--config"])


def test_short_options_are_settings_of_the_method(project):
    options = ["--config", "wanda", "--score", "RIA", "--score.alpha=1", "--sparsity=0.25"]
    options += ["--refine", "exactswap", "--ignore", "re:.*mlp.*"]
    cli = instantiate([*options, *small(project)])
    callback = find_pruning_callback(cli.trainer.callbacks)
    assert isinstance(callback, SymPrune)
    method = callback.method
    assert (method.score.alpha, method.sparsity) == (1.0, 0.25)
    assert method.refine == {"re:.*": [ExactSwap()]}
    assert method.ignore == ["re:.*mlp.*"]


@pytest.mark.parametrize("form", [["--data.dataset", "a.jsonl"], ["--data.dataset=a.jsonl"]])
def test_the_column_of_a_file(project, form):
    options = ["--config", "wanda", f"--model.pretrained={project / 'model'}"]
    data = instantiate([*options, *form, "--data.dataset.column", "body"]).datamodule
    assert data.dataset == TextSource("a.jsonl", column="body")


def test_settings_of_a_protocol(project):
    options = ["--config", "wanda", f"--model.pretrained={project / 'model'}"]
    data = instantiate([*options, "--data.dataset=c4", "--data.dataset.path=./c4"]).datamodule
    assert data.dataset == C4("./c4")


def test_other_arguments_stay_as_they_are():
    given = ["prune", "--config", "ria", "--trainer.devices=2", "--output", "score", "-c", "x"]
    assert expand(given, METHOD, {}) == given
    source = ["--data.dataset", "TextSource", "--data.dataset.path", "a", "--data.dataset.split=b"]
    assert expand(source, METHOD, {}) == source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsitty=0.6"], "there is no option --sparsitty: did you mean --sparsity?"),
        (["--pruning.sparsit=0.6"], "the method has no setting 'sparsit': did you mean sparsity?"),
        (["--sparsity=60%"], "--sparsity is '60%', which is no float or dict"),
        (["--data.sequences=x"], "--data.sequences is 'x', which is no int"),
        (
            ["--data.sequencez=8"],
            "there is no option --data.sequencez: did you mean --data.sequences?",
        ),
        (
            ["--trainer.callbacks+=torch.Nothing"],
            "--trainer.callbacks: module 'torch' has no attribute 'Nothing'",
        ),
    ],
)
def test_mistakes_are_one_sentence(project, symprune, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        symprune("prune", "--config", "ria", *small(project), *options)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"symprune: {message}\n"


def test_no_recipe(symprune, capsys):
    with pytest.raises(SystemExit):
        symprune("prune", "--output", "x")
    assert "model and data are missing: name a recipe, such as" in capsys.readouterr().err


def test_an_unknown_command(symprune):
    with pytest.raises(SystemExit, match=r"no command 'prunee': did you mean prune\?"):
        symprune("prunee")


def test_help_by_topic(symprune, capsys):
    symprune("prune", "--help", "trainer")
    text = capsys.readouterr().out
    assert "--trainer.strategy" in text
    assert "--data.dataset" not in text
    symprune("prune", "--help", "data")
    assert "--data.sequences" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no help on 'weather'; topics are: pruning,"):
        symprune("prune", "--help", "weather")


def test_the_short_help_names_options_that_exist(symprune, capsys):
    listed = {word for word in PRUNE_HELP.split() if word.startswith("--")}
    own = {f"--{name}" for name in METHOD}
    symprune("prune", "--help", "all")
    everything = capsys.readouterr().out
    others = {word.rstrip(",") for word in listed - own} - {
        "--help",
        "--when",
        "--ignore+",
        "--pruning.score",
    }
    assert others
    assert [option for option in others if option not in everything] == []
    assert set(SUMMARIES) == {"prune", "validate", "test", "fit"}


def test_fit_that_would_prune_nothing(project, symprune):
    with pytest.raises(SystemExit, match="symprune fit prunes nothing with when='validate'"):
        symprune("fit", "--config", "ria", *small(project), "--data.training_sequences=4")


def test_validate_prints_both_evaluations(project, symprune, capsys):
    symprune("validate", "--config", "ria", *small(project))
    text = capsys.readouterr().out
    assert "sparsity: 0." in text
    assert "val_perplexity: dense " in text


def test_errors_of_libraries_have_their_names(project, symprune, monkeypatch):
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("symprune_lightning.trainer.Trainer.prune", broken)
    with pytest.raises(SystemExit, match=r"symprune: RuntimeError: out of memory \(SYMPRUNE_TRACE"):
        symprune("prune", "--config", "ria", *small(project))


def test_prune_names_one_source_and_no_output(project, symprune, capsys):
    symprune("prune", "--config", "ria", *small(project))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("note: Calibration and evaluation texts are from one source.")
    assert lines[-1] == "no --output: nothing was written"
    (project / "others.txt").write_text("\n\n".join(texts(80)[40:]))
    options = [*small(project), f"--data.evaluation={project / 'others.txt'}"]
    symprune("prune", "--config", "ria", *options, "--output", project / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"checkpoint: {project / 'out'}"
    assert not lines[-2].startswith("note")
    symprune("prune", "--config", "ria", *options, "--model.pretrained", project / "out")
    note = capsys.readouterr().out.splitlines()[-2]
    assert note.startswith("note: 50.0 % of the weights of these layers were zero before pruning")
    assert note.endswith("no further weight was pruned.")


@pytest.mark.parametrize("command", list(SUMMARIES))
def test_all_options_are_known_without_torch(command, symprune, capsys):
    symprune(command, "--help", "all")
    names = set(re.findall(r"^ +(?:-\w, )?--(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert {"trainer", "model", "data", "pruning"} <= names
    assert names <= {*METHOD, *OPTIONS}


def test_the_settings_of_a_source_are_its_attributes():
    assert [field.name for field in dataclasses.fields(TextSource)] == list(SOURCE_SETTINGS)


def test_values_may_be_names_of_settings():
    check_arguments(["--output", "update", "--data.dataset.column", "score", "--sparsity", "0.5"])
    check_arguments(["--output", "group"])


def test_other_sources_have_other_settings():
    arguments = ["--data.dataset", "self", "--data.dataset.temperature", "0.5"]
    assert "--data.dataset.temperature" in expand(arguments, [], {})
    arguments = ["--data.dataset", "my.Source", "--data.dataset.init_args.size", "1"]
    assert "--data.dataset.init_args.size" in expand(arguments, [], {})


def test_ignored_layers_are_added():
    lists = [["--ignore", "a", "--ignore", "b"], ["--ignore+", "a", "--ignore=b"]]
    assert expand(lists[0], ["ignore"], {}) == ["--pruning.ignore", "a", "--pruning.ignore+", "b"]
    assert expand(lists[1], ["ignore"], {}) == ["--pruning.ignore+", "a", "--pruning.ignore+=b"]
