"""The commands of the README and the docs are accepted, and those of checkpoints run."""

from __future__ import annotations

import re
import shlex
import shutil
import sys

import pytest

from symprune_lightning import export_model, load_masks, prune_model, save_masks
from symprune_lightning.cli.commands import COMMANDS
from symprune_lightning.cli.main import main
from symprune_lightning.cli.parser import instantiate
from tests.cli.commands import small
from tests.models import batches, build
from tests.test_docs import DOCS, PAGES
from tests.texts import texts, tokenizer, write_project

ON_CHECKPOINTS = ("apply", "gain", "list", "pack", "report", "unpack", "verify")
"""Commands that are run; the others are parsed, since they take minutes or the Hub."""


def commands() -> list[str]:
    """Return the lines of console blocks that call symprune, with their continuation lines."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line[2:] for line in lines if line.startswith("$ symprune ")]
    # classes of the user would stay registered in this process: test_main.py runs one in its own
    return [line for line in dict.fromkeys(found) if "my_score" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the checkpoints that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    write_project(folder)
    build("llama").save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    page = (DOCS / "command-line.md").read_text("utf-8")
    (folder / "my-recipe.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)[0])
    (folder / "my-texts.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts()))
    for name in ("pruned", "pruned-wanda"):
        model = build("llama")
        prune_model(model, batches(), score="wanda")
        model.config._name_or_path = str(folder / "dense")
        export_model(model, folder / name, tokenizer())
    save_masks(folder / "masks.safetensors", load_masks(folder / "pruned"))
    return folder


@pytest.fixture
def pages(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("symprune_lightning.cli.gain.SECONDS", 0.001)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["symprune", *arguments])
    main()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages(line, pages, monkeypatch):
    command, *arguments = shlex.split(line.removeprefix("symprune "), comments=True)
    if command.startswith("-") or "--help" in arguments:
        run(monkeypatch, command, *arguments)
    elif command in ON_CHECKPOINTS:
        if "pruned-packed" in arguments and command == "unpack":
            run(monkeypatch, "pack", "pruned", "pruned-packed")
        if "shared" in arguments and command == "apply":
            run(monkeypatch, "pack", "pruned", "shared", "--masks_only")
        model = str(pages / "dense")
        run(monkeypatch, command, *(model if "SmolLM2" in x else x for x in arguments))
    elif command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, command, "--help")
        assert stop.value.code == 0
    else:
        # own model and data of the line come first: the tiny ones replace them
        parsed = instantiate([*_without_output(arguments), *small(pages)])
        assert parsed.model.pretrained == str(pages / "model")


def _without_output(arguments: list[str]) -> list[str]:
    """Return arguments without those of ``prune`` alone."""
    kept, skipped = [], 0
    for argument in arguments:
        if argument in ("--output", "--stream"):
            skipped = 2
        if not skipped:
            kept.append(argument)
        skipped = max(0, skipped - 1)
    return kept
