"""Arguments of the commands that are not subcommands of LightningCLI."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec

from symprune_lightning.cli.arguments import check_arguments
from symprune_lightning.cli.help import ONE_DEVICE, UsageError
from symprune_lightning.errors import SweepError

# Commands import what they need when they run: --help should not wait for torch.


def _add_trust(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument(
        "--trust_remote_code", action="store_true", help=f"allow custom code from the {source}"
    )


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
    if any(argument.partition("=")[0] == "--json" for argument in rest):
        raise UsageError(f"compare has no --json: see {options.output}/results.csv")
    check_arguments(rest)
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
    check_arguments(rest)
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
    check_arguments(rest)
    if find_spec("lm_eval") is None:
        raise ValueError('tasks need lm-evaluation-harness: pip install "symprune-lightning[eval]"')
    from symprune_lightning.callbacks.zero_shot import ZeroShot
    from symprune_lightning.cli.parser import run

    run(["prune", ONE_DEVICE, *rest], callbacks=[ZeroShot(**vars(options))])


def _verify(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune verify",
        description="Verify a pruned checkpoint against its manifest: files, weights, masks, that "
        "it loads in transformers, and its perplexity.",
    )
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument(
        "--skip_perplexity", action="store_true", help="do not evaluate the model again"
    )
    _add_trust(parser, "checkpoint")
    options = parser.parse_args(arguments)
    from symprune_lightning.cli.verify import print_checks

    print_checks(options.checkpoint, not options.skip_perplexity, options.trust_remote_code)


def _apply(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune apply",
        description="Zero the weights of a dense model where stored masks prune, and write the "
        "checkpoint. From a copy that `symprune pack --masks_only` wrote, the checkpoint is "
        "restored as it was, and the hash of every tensor is verified.",
    )
    parser.add_argument(
        "--masks",
        required=True,
        help="a masks.safetensors, the folder of a checkpoint that has one, or a copy of "
        "`symprune pack --masks_only`",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--model",
        help="hub name, folder or .gguf file of the dense model. Default: the one that a copy of "
        "`symprune pack --masks_only` names",
    )
    parser.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, float16. Default: auto"
    )
    _add_trust(parser, "model")
    options = parser.parse_args(arguments)
    from symprune_lightning.cli.apply import apply

    apply(**vars(options))


def _pack(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune pack",
        description="Write a copy of a pruned checkpoint that stores no zeros, to save disk space "
        "or to share it. `symprune unpack` restores every bit.",
    )
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--masks_only",
        action="store_true",
        help="store one bit per weight and the name of the dense model, if pruning did not change "
        "the kept weights; `symprune apply --masks OUTPUT` restores the checkpoint",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the dense model. Default: the one of the manifest"
    )
    _add_trust(parser, "dense model")
    options = parser.parse_args(arguments)
    if (options.base or options.trust_remote_code) and not options.masks_only:
        parser.error("--base and --trust_remote_code are for --masks_only")
    from symprune_lightning.checkpoints.masks_only import pack_masks
    from symprune_lightning.checkpoints.packed import folder_size, pack_checkpoint

    if options.masks_only:
        path = pack_masks(
            options.checkpoint,
            options.output,
            options.base,
            trust_remote_code=options.trust_remote_code,
        )
    else:
        path = pack_checkpoint(options.checkpoint, options.output)
    before, after = folder_size(options.checkpoint), folder_size(path)
    print(f"packed copy: {path}, {after / 1e6:.1f} MB, {after / before:.0%} of the checkpoint")


def _unpack(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune unpack",
        description="Restore a checkpoint from its packed copy, and verify every tensor.",
    )
    parser.add_argument("packed", help="folder of the packed copy")
    parser.add_argument("output", help="folder to write")
    options = parser.parse_args(arguments)
    from symprune_lightning.checkpoints.packed import unpack_checkpoint

    print(f"checkpoint: {unpack_checkpoint(options.packed, options.output)}")


def _gain(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune gain",
        description="Measure on this machine what the zeros of a checkpoint save: size on disk, "
        "and time and memory of the pruned layers in runtimes that can use zeros.",
    )
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    _add_trust(parser, "checkpoint")
    options = parser.parse_args(arguments)
    from symprune_lightning.cli.gain import print_gains

    print_gains(options.checkpoint, options.trust_remote_code)


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune report",
        description="Print methods and figures of pruned checkpoints side by side, and "
        "recommendations.",
    )
    parser.add_argument("checkpoints", nargs="+", help="folders of pruned checkpoints")
    options = parser.parse_args(arguments)
    from symprune_lightning.cli.report import print_report

    print_report(options.checkpoints)


def _list(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="symprune list",
        description="Print all scores, refiners, weight updates, solvers, allocations, patterns "
        "and recipes of this installation.",
    )
    parser.parse_args(arguments)
    from symprune_lightning.cli.list import list_methods

    list_methods()


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compare": _compare,
    "data": _data,
    "eval": _eval,
    "verify": _verify,
    "apply": _apply,
    "pack": _pack,
    "unpack": _unpack,
    "gain": _gain,
    "report": _report,
    "list": _list,
}
"""Commands that are not subcommands of LightningCLI."""
