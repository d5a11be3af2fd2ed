"""Configuration: recipes by name, the pruning method at the top level, paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from symprune_lightning import RIA, DSnoT, ExactSwap, R2DSnoT, SymPrune, TextSource, Wanda
from symprune_lightning.callbacks.pruning import find_pruning_callback
from symprune_lightning.cli.parser import instantiate
from symprune_lightning.cli.recipes import find_recipe, recipe_files
from tests.cli.commands import small


def callback_of(project: Path, *arguments: str) -> SymPrune:
    callback = find_pruning_callback(instantiate([*small(project), *arguments]).trainer.callbacks)
    assert isinstance(callback, SymPrune)
    return callback


def test_recipes_differ_in_the_method_only():
    recipes = {name: yaml.safe_load(path.read_text()) for name, path in recipe_files().items()}
    assert len(recipes) >= 4
    methods = {name: recipe.pop("pruning") for name, recipe in recipes.items()}
    training = recipes.pop("max")
    assert training["trainer"].pop("callbacks") == [
        {"class_path": "symprune_lightning.Distillation"}
    ]
    published = recipes.pop("wanda-c4")
    assert published.pop("data") == "shared/c4-wikitext2.yaml"
    first, *others = recipes.values()
    assert published == {k: v for k, v in first.items() if k != "data"}
    assert all(recipe == first for recipe in others)
    assert all(m.get("sparsity") == 0.5 or m["pattern"] == "2:4" for m in methods.values())
    # listed with their first line by `symprune list`
    assert all(path.read_text().startswith("# ") for path in recipe_files().values())


def test_recipes_are_found_by_name_or_path(tmp_path, monkeypatch):
    assert Path(find_recipe("ria")) == recipe_files()["ria"]
    (tmp_path / "own.yaml").write_text("pruning: {score: RIA}\n")
    assert find_recipe(str(tmp_path / "own.yaml")) == str(tmp_path / "own.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_recipe("~/own.yaml") == str(tmp_path / "own.yaml")
    with pytest.raises(ValueError, match=r"no file or recipe own.yml; the recipes are: .*wanda"):
        find_recipe("own.yml")


@pytest.mark.parametrize("option", [["--config", "ria-r2dsnot"], ["--config=ria-r2dsnot"]])
def test_options_override_recipes(project, option):
    callback = callback_of(project, *option, "--pruning.sparsity=0.25")
    assert callback.method.sparsity == 0.25
    assert callback.method.score == RIA()
    assert callback.method.refine == {"re:.*": [R2DSnoT(guard="gram")]}


def test_the_default_method_without_a_recipe(project):
    assert callback_of(project).settings == SymPrune().settings


def test_methods_by_name_or_class(project):
    (project / "own.yaml").write_text(
        yaml.safe_dump(
            {
                "pruning": {
                    "score": "wanda",
                    "refine": {"re:.*mlp.*": {"class_path": "DSnoT"}, "re:.*": "exactswap"},
                }
            }
        )
    )
    method = callback_of(project, "--config", str(project / "own.yaml")).method
    assert method.score == Wanda()
    assert method.refine == {"re:.*mlp.*": [DSnoT()], "re:.*": [ExactSwap()]}
    method = callback_of(project, "--pruning.score=RIA", "--pruning.score.alpha=1").method
    assert method.score == RIA(alpha=1.0)


def test_null_disables_the_pruning_method(project):
    cli = instantiate([*small(project), "--config", "ria", "--pruning", "null"])
    assert not [c for c in cli.trainer.callbacks if isinstance(c, SymPrune)]


def test_paths_are_not_read_as_configuration(project):
    """Lightning's parser would replace the path of an existing file by its contents."""
    (project / "model.gguf").write_text("a: 1\n")
    arguments = [*small(project), f"--model.pretrained={project / 'model.gguf'}"]
    cli = instantiate(arguments)
    assert cli.model.pretrained == str(project / "model.gguf")
    assert cli.datamodule.dataset == str(project / "texts.txt")


def test_the_tokenizer_is_that_of_the_model(project):
    cli = instantiate(small(project))
    assert cli.datamodule.tokenizer.name_or_path == str(project / "model")


def test_null_takes_a_setting_of_a_recipe_back(project):
    options = [*small(project), "--config", "wanda-c4", "--data.evaluation=null"]
    assert instantiate(options).datamodule.evaluation is None


def test_named_evaluation_sets(project):
    """A value that one type of a union refuses is tried on the next."""
    texts = str(project / "texts.txt")
    sets = {"docs": None, "wiki": "wikitext2", "own": texts, "part": {"path": texts}}
    (project / "sets.yaml").write_text(yaml.safe_dump({"data": {"evaluation": sets}}))
    from_file = ["--config", str(project / "sets.yaml")]
    as_json = ["--data.evaluation", json.dumps(sets)]
    for options in (from_file, as_json):
        data = instantiate([*small(project), "--config", "wanda", *options]).datamodule
        part = data.evaluation.pop("part")
        assert part == TextSource(texts)
        assert data.evaluation == {"docs": None, "wiki": "wikitext2", "own": texts}
    dotted = ["--data.evaluation.docs=null", f"--data.evaluation.own={texts}"]
    data = instantiate([*small(project), "--config", "wanda", *dotted]).datamodule
    assert data.evaluation == {"docs": None, "own": texts}
