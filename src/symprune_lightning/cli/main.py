"""Entry point of the ``symprune`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

from symprune_lightning import __version__
from symprune_lightning.errors import (
    PruningError,
    RankError,
    SweepError,
    VerificationError,
)

HELP = """usage: symprune COMMAND ...

  prune     evaluate a model, prune it, evaluate it again, write the checkpoint
  compare   several recipes on the same model and tokens
  data      the sequences that a recipe would feed to the model
  eval      tasks of lm-evaluation-harness on the dense and on the pruned model
  verify    verify a checkpoint against its manifest
  apply     zero the weights of a dense model by stored masks
  list      scores, refiners, weight updates, solvers, allocations, patterns, recipes
  validate, test, fit   as in LightningCLI, with pruning

examples:
  symprune prune --config ria-exactswap --output pruned
  symprune prune --config ria --model.pretrained ./my-model \\
      --data.dataset my-texts.jsonl --pruning.sparsity 0.6 --output pruned
  symprune compare ria wanda --output runs/compare --data.sequences=16
  symprune verify pruned

`symprune COMMAND --help` shows the options of a command. SYMPRUNE_TRACEBACK=1 shows tracebacks.
"""

USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    PruningError,
    RankError,
    VerificationError,
    SweepError,
)
"""Errors that are reported without a traceback."""


# Commands import what they need when they run: --help should not wait for torch.


def _compare(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune compare",
        description="Prune one model by several recipes and evaluate each on the same tokens.",
        epilog="Other options, such as --data.sequences=16 (with =), apply to every recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", help="recipes, or YAML files that list some")
    parser.add_argument("--output", required=True, help="folder for results.csv, compare.png")
    options, rest = parser.parse_known_args(arguments)
    from rich.console import Console

    from symprune_lightning.cli.compare import compare

    results = compare(options.recipes, options.output, rest, Console())
    failed = [f"{result.name}: {result.failure}" for result in results if result.failure]
    if failed:
        raise SweepError("; ".join(["some recipes failed", *failed]))


def _data(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune data",
        description="Print sizes, hashes and the first sequence of each split of a recipe's data. "
        "The model is not loaded.",
        epilog="Options are those of `symprune prune`, such as --config and --data.dataset.",
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(arguments)
    from symprune_lightning.cli.data import print_data

    print_data(rest)


def _eval(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune eval",
        description="Run tasks of lm-evaluation-harness on a model before and after pruning it.",
        epilog="Other options are those of `symprune prune`, such as --config; without --output "
        "nothing is written. For a checkpoint on disk, use lm_eval --model hf.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="names, as in `lm_eval ls tasks`")
    parser.add_argument("--limit", type=int, help="maximum number of examples per task")
    parser.add_argument("--few_shot", type=int, help="number of examples in the prompt")
    parser.add_argument("--include_path", help="folder with additional task files")
    options, rest = parser.parse_known_args(arguments)
    if find_spec("lm_eval") is None:
        raise ValueError('tasks need lm-evaluation-harness: pip install "symprune-lightning[eval]"')
    from symprune_lightning.callbacks.zero_shot import ZeroShot
    from symprune_lightning.cli.parser import run

    run(["prune", *rest], callbacks=[ZeroShot(**vars(options))])


def _verify(arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    from symprune_lightning.cli.verify import print_checks

    auto_cli(print_checks, args=arguments, prog="symprune verify")


def _apply(arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    from symprune_lightning.cli.apply import apply

    auto_cli(apply, args=arguments, prog="symprune apply", as_positional=False)


def _list(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"symprune list takes no arguments: {' '.join(arguments)}")
    from symprune_lightning.cli.list import list_methods

    list_methods()


def _lightning(arguments: list[str]) -> None:
    from symprune_lightning.cli.parser import run

    run(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compare": _compare,
    "data": _data,
    "eval": _eval,
    "verify": _verify,
    "apply": _apply,
    "list": _list,
}
"""Commands that are not subcommands of LightningCLI."""


def main() -> None:
    """Run the command line of this process."""
    arguments = sys.argv[1:]
    # recipes may name the user's classes; last, so that installed packages take precedence
    sys.path.append(os.getcwd())
    try:
        if arguments[:1] in ([], ["--help"], ["-h"]):
            print(HELP, end="")
        elif arguments == ["--version"]:
            print(f"symprune-lightning {__version__}")
        elif arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
        else:
            _lightning(arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns KeyboardInterrupt into SystemExit
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        # only these keep a journal
        resumes = arguments[0] in ("prune", "compare") and "--output" in " ".join(arguments)
        sys.exit(f"symprune: interrupted{'; rerun the same command to resume' * resumes}")
    except USER_ERRORS as error:
        if os.environ.get("SYMPRUNE_TRACEBACK"):
            raise
        sys.exit(f"symprune: {error}")


if __name__ == "__main__":
    main()
