"""The ``symprune`` command."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from symprune_lightning import recipes
from symprune_lightning.apply import apply
from symprune_lightning.compare import CompareError, compare
from symprune_lightning.engine.parallel import RankError
from symprune_lightning.engine.result import PruningError
from symprune_lightning.functional.allocation import Allocation
from symprune_lightning.functional.naming import subclasses
from symprune_lightning.functional.patterns import Pattern
from symprune_lightning.functional.refiners import MaskRefiner
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.update import WeightUpdate
from symprune_lightning.verify import VerificationError, report

HELP = """usage: symprune COMMAND ...

  prune     evaluate a model, prune it, evaluate it again, write the checkpoint
  compare   several recipes on the same model and tokens
  eval      tasks of lm-evaluation-harness, on the dense and on the pruned model
  verify    prove that a checkpoint is what its manifest says
  apply     put stored masks onto the dense model
  list      scores, refiners, weight updates, allocations, patterns, recipes
  validate, test, fit   as in LightningCLI, with pruning callbacks

examples:
  symprune prune --config recipes/ria-exactswap.yaml --output pruned
  symprune prune --config recipes/ria.yaml --model.pretrained ./my-model \\
      --data.dataset my-texts.jsonl --trainer.callbacks.init_args.sparsity 0.6 --output pruned
  symprune compare recipes/*.yaml --output runs/compare --data.sequences=16
  symprune verify pruned

`symprune COMMAND --help` shows the options of a command. SYMPRUNE_TRACEBACK=1 shows
where an error came from.
"""

MISTAKES = (
    ValueError,
    TypeError,
    OSError,
    PruningError,
    RankError,
    VerificationError,
    CompareError,
)
"""What is told without a traceback."""


def _compare(rest: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune compare",
        description="Prune one model by several recipes and evaluate each on the same tokens.",
        epilog="Other options, such as --data.sequences=16 (with =), are given to every recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", help="recipe files, or YAML files that list some")
    parser.add_argument("--output", required=True, help="folder for results.csv, compare.png")
    options, arguments = parser.parse_known_args(rest)
    rows = compare(options.recipes, options.output, arguments, Console())
    failed = [f"{row.recipe}: {row.error}" for row in rows if row.error is not None]
    if failed:
        raise CompareError("; ".join(["some recipes have failed", *failed]))


def _eval(rest: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune eval",
        description="Run tasks of lm-evaluation-harness on a model before and after pruning it.",
        epilog="Other options are those of `symprune prune`, such as --config; without --output "
        "nothing is written. For a checkpoint that is written already: lm_eval --model hf.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="names, as in `lm_eval ls tasks`")
    parser.add_argument("--limit", type=int, help="only so many examples of each task")
    parser.add_argument("--few_shot", type=int, help="examples before each question")
    parser.add_argument("--include_path", help="folder with task files of your own")
    options, arguments = parser.parse_known_args(rest)
    if find_spec("lm_eval") is None:
        raise ValueError('tasks need lm-evaluation-harness: pip install "symprune-lightning[eval]"')
    callback = {
        "class_path": "symprune_lightning.zero_shot.ZeroShot",
        "init_args": vars(options),
    }
    recipes.run(["prune", *arguments, f"--trainer.callbacks+={json.dumps(callback)}"])


def _list(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"symprune list takes no arguments: {' '.join(rest)}")
    console = Console(emoji=False, markup=False)  # N:M: is no emoji
    bases: dict[str, type[object]] = {
        "scores": Score,
        "refiners": MaskRefiner,
        "weight updates": WeightUpdate,
        "allocations": Allocation,
        "patterns": Pattern,
    }
    for title, base in bases.items():
        shown = Table("name", "what it is", title=title, title_justify="left", show_header=False)
        for method in subclasses(base):
            if not inspect.isabstract(method):
                shown.add_row(method.__name__, _first_line(method))
        console.print(shown)
    files = recipes.recipe_files()
    shown = Table("recipe", "what it is", show_header=False)
    for path in files:
        first = path.read_text("utf-8").splitlines()[0]
        shown.add_row(path.name, first.removeprefix("#").strip())
    # soft: a path that is folded to the terminal's width can't be copied
    console.print(f"recipes in {files[0].parent}", soft_wrap=True, style="table.title")
    console.print(shown)


def _first_line(method: type) -> str:
    return (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "compare": _compare,
    "eval": _eval,
    "verify": lambda rest: auto_cli(report, args=rest, prog="symprune verify"),
    "apply": lambda rest: auto_cli(apply, args=rest, prog="symprune apply", as_positional=False),
    "list": _list,
}
"""Commands that are not those of LightningCLI."""


def main() -> None:
    """Entry point of ``symprune``."""
    command, rest = sys.argv[1:2], sys.argv[2:]
    # recipes may name classes of the user's; last, so that nothing installed is hidden
    sys.path.append(os.getcwd())
    try:
        if command in ([], ["--help"], ["-h"]):
            print(HELP, end="")
        elif command[0] in COMMANDS:
            COMMANDS[command[0]](rest)
        else:
            recipes.run()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes one of the other
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        sys.exit("symprune: interrupted; the same command goes on from the last finished block")
    except MISTAKES as error:
        if os.environ.get("SYMPRUNE_TRACEBACK"):
            raise
        sys.exit(f"symprune: {error}")
