"""``symprune prune``, ``validate``, ``test`` and ``fit``: LightningCLI with pruning recipes.

Longer than 300 lines since each subcommand checks its callbacks and prints its result.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import datasets
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils import logging as transformers_logging

from symprune_lightning.callbacks.distillation import refuse_distillation
from symprune_lightning.callbacks.pruning import (
    PruningCallback,
    find_pruning_callback,
    pruning_callbacks,
)
from symprune_lightning.callbacks.symprune import SymPrune
from symprune_lightning.checkpoints.card import ONE_SOURCE, is_one_source
from symprune_lightning.cli.arguments import expand, usage_message
from symprune_lightning.cli.help import METHOD
from symprune_lightning.cli.recipes import resolve_recipes
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.data.protocols import PROTOCOLS
from symprune_lightning.data.sources import source_settings
from symprune_lightning.errors import PruningWarning, first_of
from symprune_lightning.module import CausalLMModule
from symprune_lightning.trainer import Trainer

FULL_COVERAGE = 0.995
"""Coverage that is not printed."""

SAVING = "--trainer.enable_checkpointing true saves weights during a fit"


class PathParser(LightningArgumentParser):
    """Parser that keeps a value that is the path of a file as it was written.

    Lightning's parser would replace it by the contents of the file: ``dataset: my.txt`` and
    ``pretrained: model.gguf`` would be read as configuration. ``model: part.yaml`` still is.
    """

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Add arguments without ``sub_configs``."""
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence, and exit with code 2."""
        if not self.exit_on_error:  # it tries one type of a union; another may accept the value
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sentence = usage_message(message, parser._option_string_actions, METHOD)
        self.exit(2, f"symprune: {sentence}\n")


class PruningCLI(LightningCLI):
    """LightningCLI with the subcommand ``prune`` and the pruning method at the top level."""

    trainer: Trainer

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments that are not options."""
        skipped = {"model", "datamodule", "callbacks"}
        return {
            "prune": {*skipped, "dataloaders"},
            "validate": {*skipped, "dataloaders"},
            "test": {*skipped, "dataloaders"},
            "fit": {*skipped, "train_dataloaders", "val_dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the pruning method and output options; link the tokenizer to the model."""
        parser.add_argument(
            "--pruning",
            type=SymPrune | None,
            default={"class_path": "symprune_lightning.SymPrune"},
            help="The pruning method; null if trainer.callbacks has a pruning callback.",
        )
        parser.link_arguments("model.pretrained", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.add_argument(
            "--quiet", action="store_true", help="No progress bars; print only the result."
        )
        parser.add_argument("--json", action="store_true", help="Print the result as JSON only.")

    def before_instantiate_classes(self) -> None:
        """Apply --quiet and --json."""
        if self._get(self.config, "quiet") or self._get(self.config, "json"):
            trainer = self._get(self.config, "trainer")
            trainer.enable_progress_bar = trainer.enable_model_summary = False
            if self.subcommand in ("validate", "test"):
                self.config[self.subcommand].verbose = False  # Lightning's table of metrics
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
            # what the result does not show by itself
            warnings.simplefilter("once", PruningWarning)
            bars: Any = transformers_logging  # without types
            bars.disable_progress_bar()
            datasets.disable_progress_bars()

    def instantiate_classes(self) -> None:
        """Instantiate model, data and Trainer; errors of constructors are raised unchanged."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise _constructor_error(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the Trainer, with the pruning method among its callbacks."""
        if self._get(self.config_init, "pruning") is not None:
            self._parser(self.subcommand).callback_keys.append("pruning")
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, Trainer)
        return trainer

    def before_validate(self) -> None:
        """Refuse a callback that would have no effect.

        Raises:
            ValueError: There is a ``Distillation`` callback, or no pruning callback prunes in this
                command.
        """
        command = self.subcommand or "validate"
        refuse_distillation(self.trainer.callbacks, command)
        pruning = self._pruning_callbacks
        if pruning and all(callback.when != command for callback in pruning):
            raise ValueError(
                f"symprune {command} prunes nothing with when={pruning[0].when!r}: use --when "
                f"{command}"
            )

    before_test = before_validate

    @property
    def _pruning_callbacks(self) -> list[PruningCallback]:
        return pruning_callbacks(self.trainer.callbacks)

    def before_fit(self) -> None:
        """Refuse a pruning callback that would have no effect.

        Raises:
            ValueError: No pruning callback prunes in ``fit``.
        """
        pruning = self._pruning_callbacks
        if pruning and all(c.when in ("validate", "test") for c in pruning):
            raise ValueError(
                f"symprune fit prunes nothing with when={pruning[0].when!r}: use --when fit_start "
                f"(with the callback MaskedFinetuning) or --when fit_end"
            )

    def after_validate(self) -> None:
        """Print the result.

        Raises:
            ValueError: Nothing was pruned.
        """
        results = self._print_results()
        if self._pruning_callbacks and not results:
            raise ValueError(
                "nothing was pruned, because no batch was evaluated: check the evaluation texts "
                "and limit_val_batches"
            )

    after_test = after_validate

    def after_fit(self) -> None:
        """Print the result, and whether weights were saved."""
        saved = [path for c in self.trainer.checkpoint_callbacks if (path := _last_path(c))]
        output = saved[0] if saved else None
        pruned = self._print_results(output)
        if not self.trainer.is_global_zero:
            return
        if not self._get(self.config, "json"):
            print(f"nothing was written: {SAVING}" if output is None else f"checkpoint: {output}")
        elif not pruned:  # by the fit that this one resumes
            print(json.dumps({"sparsity": None, "output": output}))

    def _print_results(self, output: str | None = None) -> bool:
        """Print the results of callbacks that have pruned; return whether there is one."""
        pruned = [callback for callback in self._pruning_callbacks if callback.result is not None]
        for callback in pruned if self.trainer.is_global_zero else ():
            as_json = self._get(self.config, "json")
            print(_as_json(callback, output) if as_json else _as_text(callback))
        return bool(pruned)

    def after_prune(self) -> None:
        """Print the result."""
        if not self.trainer.is_global_zero:
            return
        callback = find_pruning_callback(self.trainer.callbacks)
        output = self._get(self.config, "output")
        as_json = self._get(self.config, "json")
        if as_json:
            print(_as_json(callback, output))
            return
        print(_as_text(callback))
        # without the hashes of the tokens, which `settings` computes
        data = {"evaluation": source_settings(self.datamodule.evaluation)}
        if is_one_source({"data": data, "metrics": {"pruned": callback.sparse_metrics}}):
            print(f"note: {ONE_SOURCE}")
        print("no --output: nothing was written" if output is None else f"checkpoint: {output}")


def _last_path(callback: Callback) -> str:
    """Return the path that a checkpoint callback wrote last; empty without one."""
    paths = (getattr(callback, name, "") for name in ("best_model_path", "last_model_path"))
    return next(filter(None, paths), "")


def instantiate(arguments: Sequence[str]) -> PruningCLI:
    """Instantiate a recipe's model, data and Trainer without running anything.

    Args:
        arguments: Those of ``symprune prune``, such as ``["--config", "ria"]``.
    """
    return _make_cli(arguments, run=False)


def run(arguments: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
    """Run a command line.

    Args:
        arguments: Subcommand and options.
        callbacks: Callbacks in addition to those of the configuration.
    """
    _make_cli(arguments, callbacks=callbacks)


def _resolve(arguments: Sequence[str]) -> list[str]:
    """Write out short options, and replace names of recipes after ``--config`` by paths."""
    classes = {name: f"symprune_lightning.{type(x).__name__}" for name, x in PROTOCOLS.items()}
    return resolve_recipes(expand(arguments, METHOD, classes))


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings of this package without the line of code that raised them."""
    before = warnings.formatwarning  # Lightning's

    def show(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if issubclass(category, PruningWarning):
            return f"symprune: warning: {message}\n"
        return before(message, category, *place)

    warnings.formatwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


def _make_cli(
    arguments: Sequence[str], *, run: bool = True, callbacks: Sequence[Callback] = ()
) -> PruningCLI:
    with warnings.catch_warnings(), _short_warnings():
        # raised for any arguments that are not sys.argv; ours have names of recipes replaced
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        return PruningCLI(
            CausalLMModule,
            CalibrationDataModule,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": list(callbacks)} if callbacks else None,
            parser_class=PathParser,
            save_config_callback=None,
            seed_everything_default=0,
            args=_resolve(arguments),
            run=run,
            # the default usage lists every option, before any error message
            parser_kwargs={
                name: {"usage": f"symprune {name} [options]"} for name in PruningCLI.subcommands()
            },
        )


def _constructor_error(error: ValueError) -> BaseException:
    """Return the error of the first type of a union; jsonargparse reports all types, with values.

    The first type is the one that is meant: ``SymPrune`` in ``SymPrune | None``.
    """
    cause: BaseException = error
    while str(cause).startswith("Does not validate against any of the Union subtypes"):
        if cause.__cause__ is None:
            return cause
        cause = cause.__cause__
    return cause


def _as_text(callback: PruningCallback) -> str:
    assert callback.result is not None
    result = callback.result
    lines = [f"sparsity: {result.sparsity:.6f} over {len(result.layers)} layers"]
    for name, pruned in callback.sparse_metrics.items():
        dense = callback.dense_metrics.get(name)
        before = "" if dense is None else f"dense {dense:.4f}, "
        lines.append(f"{name}: {before}pruned {pruned:.4f}")
    if result.coverage < FULL_COVERAGE:
        lines.append(
            f"coverage: {result.coverage:.1%} of the weights of the blocks are in pruned layers"
        )
    if result.unreached:
        names, number = first_of(result.unreached), len(result.unreached)
        lines.append(f"no calibration token reached {number} layers: {names}")
    if result.sparse_start:
        lines.append(f"note: {result.sparse_start}")
    return "\n".join(lines)


def _as_json(callback: PruningCallback, output: str | None) -> str:
    assert callback.result is not None
    return json.dumps(
        {
            "sparsity": callback.result.sparsity,
            "layers": len(callback.result.layers),
            "coverage": callback.result.coverage,
            "unreached_layers": list(callback.result.unreached),
            "seconds": callback.seconds,
            "dense": callback.dense_metrics,
            "pruned": callback.sparse_metrics,
            "output": output,
        }
    )
